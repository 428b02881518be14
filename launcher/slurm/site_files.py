"""Where the files of sites are: slurm/clusters and slurm/networks of the working directory, then
the installed ones."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def slurm_folder() -> Path:
    """The folder slurm/: next to the packages in a source tree; below share/convoy of an installed
    wheel."""
    source = Path(__file__).resolve().parents[2]
    installed = [Path(sysconfig.get_path("data", scheme)) for scheme in (sysconfig.get_default_scheme(), "posix_user")]
    places = [source / "slurm", *(folder / "share" / "convoy" / "slurm" for folder in (source, *installed))]
    return next((place for place in places if (place / "clusters").is_dir()), places[0])


def folders(kind: str) -> list[Path]:
    """Folders with files of ``kind``, "clusters" or "networks"; the first wins."""
    return list(dict.fromkeys([Path("slurm", kind).absolute(), (slurm_folder() / kind).absolute()]))


def names(kind: str) -> list[str]:
    """Every name that ``--profile`` or ``network`` may give."""
    return sorted({file.stem for folder in folders(kind) for file in folder.glob("*.toml")})


def candidates(kind: str, name: str, base: Path = Path()) -> list[Path]:
    """Paths that ``name`` may mean, best first. A name that ends in .toml is a path, relative to
    ``base``."""
    if name.endswith(".toml"):
        return [base / Path(name).expanduser()]
    return [folder / f"{name}.toml" for folder in folders(kind)]


def find(kind: str, name: str, base: Path = Path()) -> Path | None:
    """The file that ``name`` means; None where there is none."""
    return next((path for path in candidates(kind, name, base) if path.is_file()), None)
