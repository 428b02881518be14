import sys

# python -m launcher: another project's training/ or eval/ may lie where it was typed
if sys.argv[:1] == ["-m"]:
    from launcher.run_module import settle_current_folder

    settle_current_folder()
