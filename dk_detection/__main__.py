"""The tools of this project where it is installed, also as `python -m dk_detection`.

dk-detection TOOL ARGUMENTS         dk-detection train_net --config CONFIG
dk-detection configs [WORD ...]     lists the configs (mmdet, mmpretrain, mmseg, detectron2) with all the words
"""

import os
import sys

from dk_detection.config_files import FOLDERS, PACKAGE

TOOLS = PACKAGE / ".mim" / "tools"


def main() -> None:
    # What is not marked as a script is a part of one.
    names = sorted(path.stem for path in TOOLS.glob("*.py") if path.read_text(encoding="utf-8").startswith("#!"))
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "configs":
        paths = [(name, path) for name, folder in FOLDERS.items() for path in sorted(folder.glob("[!_]*/*.*"))]
        names = [(f"{name}/{path.parent.name}/{path.name}", path) for name, path in paths]
        found = [str(path) for name, path in names if all(word in name for word in arguments)]
        print(*found, sep="\n")
        sys.exit(0 if found else f"dk-detection: no config has {' and '.join(arguments)} in its name")
    if name in ("-h", "--help"):
        print(f"{__doc__}\nThe tools, each of which has --help: {', '.join(names)}")
        return
    if name not in names:
        sys.exit(f"dk-detection: there is no tool {name!r}; there are {', '.join(names)} and configs")
    os.execv(sys.executable, [sys.executable, str(TOOLS / f"{name}.py"), *arguments])


if __name__ == "__main__":
    main()
