"""Configuration of the data's preparation: sections ``model`` and ``data``. Standard library only.

The trainers' configuration is training/config/trainers.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from training.config.schema import at_least, one_of

FAMILIES = ("bloom", "llama", "mistral", "qwen2", "qwen3")
"""config.json's ``model_type`` of what can be trained: each has a folder in training/models: table,
module, decoder."""


@dataclass(frozen=True)
class ModelConfig:
    """Section ``model``: the Hugging Face checkpoint that the chain starts from."""

    checkpoint: str = "demo"
    """Folder with config.json, weights and tokenizer, or "demo": a tiny random model made on the
    spot."""
    demo_family: str = "bloom"
    """Family of the demo model: "bloom", "llama", "mistral", "qwen2" or "qwen3"."""
    demo_layers: int = 4
    """Layers of the demo model."""
    demo_hidden: int = 96
    """Hidden size of the demo model."""
    demo_heads: int = 6
    """Attention heads of the demo model; ALiBi takes any number."""
    demo_vocab: int = 512
    """Vocabulary rows of the demo model (its tokenizer is trained to fit)."""

    def __post_init__(self):
        one_of(self, "demo_family", FAMILIES)
        at_least(self, 1, "demo_layers", "demo_hidden", "demo_heads", "demo_vocab")
        if self.demo_hidden % self.demo_heads:
            raise ValueError(f"demo_hidden = {self.demo_hidden} is not a multiple of demo_heads = {self.demo_heads}")


@dataclass(frozen=True)
class DataConfig:
    """Section ``data``: where prompts, replies and comparisons come from."""

    source: str = "demo"
    """"demo" (generated), or a .jsonl / .jsonl.gz file: Anthropic HH, TRL's formats, chat messages
    or our own."""
    template: str = "auto"
    """Form of prompts and replies: "chat" is the tokenizer's own chat template, "hh" Anthropic HH's
    dialogue text; "auto" takes the template where the tokenizer has one."""
    chat_template_kwargs: dict = field(default_factory=dict)
    """More variables for the chat template, such as Qwen 3's {enable_thinking = false}; a row's own
    come first."""
    assistant_turns: str = "all"
    """Replies of a chat that SFT learns: "all", or the "last" alone."""
    seed: int = 0
    """Seed of the generator and of the split."""
    heldout: float = 0.05
    """Share of each stage's prompts that no stage trains on, 0..0.5."""
    heldout_max: int = 256
    """Most prompts that are held out for one stage."""
    skip_bad_rows: bool = False
    """Count and skip rows that can't be used instead of stopping at the first."""

    def __post_init__(self):
        at_least(self, 0, "heldout_max")
        one_of(self, "template", ("auto", "chat", "hh"))
        one_of(self, "assistant_turns", ("all", "last"))
        if not 0 < self.heldout <= 0.5:
            raise ValueError(f"heldout = {self.heldout}: expected a share above 0 and at most 0.5")


@dataclass(frozen=True)
class PreparePaths:
    output: str
    """Folder for the prepared files: sft.jsonl, sft_heldout.jsonl, reward.jsonl,
    reward_heldout.jsonl, rlhf.jsonl, heldout.jsonl."""
    model: str
    """Folder for the demo's Hugging Face checkpoint (written only when model.checkpoint is
    "demo")."""


@dataclass(frozen=True)
class PrepareConfig:
    """What ``python -m training.data.prepare`` reads. It is no stage: it runs on the login node
    before anything is queued."""

    paths: PreparePaths
    model: ModelConfig
    data: DataConfig
