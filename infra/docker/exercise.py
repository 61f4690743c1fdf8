"""Run each instruction of the Dockerfile, in order, without a container engine, in root directories made for it.

    python infra/docker/exercise.py [--variant cpu|cuda] [--keep FOLDER]

* A stage is a folder that becomes the root of a mount namespace of its own (`unshare`, `chroot`; as root, or with user
  namespaces): this machine's /usr, /bin, /lib and the like are mounted read-only, everything else is the stage's own
  and empty. So the base image is this machine's Debian and Python, and what an instruction adds or forgets shows.
* COPY sees the build context through .dockerignore; RUN has the stage's ENV, ARG, WORKDIR and USER, and no other
  environment except pip's settings, with the folders of wheels that they name; nothing else of this machine is visible.
* apt-get installs nothing, since /usr is this machine's: the requested packages have to be installed here.
* pip takes torch from its own index here (TORCH_INDEX is empty): the addresses of the CPU and CUDA builds are untested.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra" / "docker" / "Dockerfile"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/dev", "/proc", "/var/lib/dpkg")
OWN = ("tmp", "root", "home", "opt", "var", "run", "src")
HERE = {"TORCH_INDEX": ""}  # build arguments that differ here
LIMIT_S = 1200
APT_GET = """#!/bin/sh
[ "$1" = install ] || exit 0
shift
for word; do case $word in -*) ;; *) dpkg-query --show "$word" || exit 100;; esac; done
"""


@dataclass
class Stage:
    """A build stage: its root, and what its instructions have set."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0:0"


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Parse a Dockerfile into (word, rest), with continued lines joined and comments dropped."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), re.sub(r"\s+", " ", rest).strip()


def context(folder: Path) -> Path:
    """Copy the build context: the working tree filtered by .dockerignore."""
    rules = [line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines()]
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file() and not is_ignored(name, rules):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def is_ignored(name: str, rules: list[str]) -> bool:
    """Apply .dockerignore: the last rule that matches a path, or a folder above it, decides."""
    ignored = False
    for rule in rules:
        pattern = rule.lstrip("!").rstrip("/")
        above = [name, *(str(parent) for parent in Path(name).parents if str(parent) != ".")]
        if any(fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(f"/{path}", pattern[2:]) for path in above):
            ignored = not rule.startswith("!")
    return ignored


class Build:
    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self.given = folder, {"VARIANT": variant, **HERE}
        self.context = context(_made(folder / "context"))
        self.stages: dict[str, Stage] = {}
        self.arguments: dict[str, str] = {}  # before the first FROM
        self.stage: Stage | None = None
        self.ran = 0

    def do(self, word: str, rest: str) -> None:
        """Run one instruction. Raises SystemExit when it is unknown or fails."""
        print(f"== {word} {rest[:100]}", flush=True)
        step = getattr(self, f"_{word.lower()}", None)
        if step is None:
            raise SystemExit(f"exercise: {word} is not exercised; teach it, or take it out of the Dockerfile")
        step(rest)
        self.ran += 1

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        scope = self.stage.arguments if self.stage else self.arguments
        scope[name] = self.given.get(name, value or self.arguments.get(name, ""))

    def _from(self, rest: str) -> None:
        name = rest.split(" AS ")[1].strip() if " AS " in rest else f"stage{len(self.stages)}"
        root = _made(self.folder / name)
        for own in OWN:
            _made(root / own)
        (root / "tmp").chmod(0o1777)
        shutil.copytree("/etc", root / "etc", symlinks=True, ignore=_unreadable)
        _system_accounts_only(root / "etc")
        self.stage = self.stages[name] = Stage(root)
        base = _made(root / "run" / "base")  # the base image's `python`
        (base / "python").symlink_to(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")
        (base / "apt-get").write_text(APT_GET)
        (base / "apt-get").chmod(0o755)
        self.stage.environment["PATH"] = "/run/base:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"

    def _env(self, rest: str) -> None:
        assert self.stage
        known = self.stage.environment
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            known[name] = re.sub(r"\$\{?(\w+)\}?", lambda match: known.get(match[1], ""), value)

    def _workdir(self, rest: str) -> None:
        assert self.stage
        self.stage.folder = rest
        _made(self.stage.root / rest.strip("/"))

    def _user(self, rest: str) -> None:
        assert self.stage
        self.stage.user = rest

    def _cmd(self, rest: str) -> None:
        self._inside(json.loads(rest))

    def _copy(self, rest: str) -> None:
        assert self.stage
        words = rest.split()
        source = self.context
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).partition("=")[2]].root
        *names, to = words
        target = self.stage.root / to.strip("/") if to.startswith("/") else self.stage.root / self.stage.folder[1:] / to
        for name in names:
            found = source / name.strip("/")
            if not found.exists():
                raise SystemExit(f"exercise: COPY {name}: not in the build's context")
            if found.is_dir():
                shutil.copytree(found, target, symlinks=True, dirs_exist_ok=True)
            else:
                into = target / found.name if to.endswith("/") or len(names) > 1 else target
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, into)

    def _run(self, rest: str) -> None:
        self._inside(["/bin/sh", "-c", rest])

    def _inside(self, command: list[str]) -> None:
        """Run a command in the stage's root, with nothing of this environment but pip's settings."""
        assert self.stage
        stage, pip = self.stage, {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment = {**pip, **stage.environment, **stage.arguments, "HOME": "/root"}
        if stage.user != "0:0":
            environment["HOME"] = stage.folder
        wheels = [path for path in pip.get("PIP_FIND_LINKS", "").split() if path.startswith("/")]
        seen = [path for path in dict.fromkeys((*SYSTEM, sys.base_prefix, *wheels)) if Path(path).exists()]
        mounts = "".join(_mount(path, stage.root) for path in seen if path == "/usr" or not path.startswith("/usr/"))
        user, _, group = stage.user.partition(":")
        inside = f"cd {shlex.quote(stage.folder)} && exec {shlex.join(command)}"
        chroot = f"exec chroot --userspec={user}:{group or user} {stage.root} /bin/sh -c {shlex.quote(inside)}"
        ran = subprocess.run(
            ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-auto", "--map-root-user"]),
             "/bin/sh", "-c", mounts + chroot],
            env=environment, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if ran.returncode:
            raise SystemExit(f"exercise: failed with {ran.returncode}: {shlex.join(command)}")


def _mount(path: str, root: Path) -> str:
    """Format the shell line that mounts a folder of this machine; only virtual filesystems are writable."""
    live = path in ("/dev", "/proc")
    if Path(path).is_symlink():
        return f"ln -sfn {Path(path).readlink()} {root}{path} || exit 1\n"
    line = f"mkdir -p {root}{path} && mount --{'r' if live else ''}bind {path} {root}{path}"
    return line + ("" if live else f" && mount -o remount,ro,bind {root}{path}") + " || exit 1\n"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _unreadable(folder: str, names: list[str]) -> set[str]:
    """Hide keys and sockets."""
    return {name for name in names if name in ("shadow", "gshadow", "ssl-private", "private", "ssh", "sudoers.d")}


def _system_accounts_only(etc: Path) -> None:
    """Keep only system accounts, with locked passwords: a base image has no users of this machine."""
    for name in ("passwd", "group"):
        lines = (etc / name).read_text().splitlines()
        kept = [line for line in lines if not 1000 <= int(line.split(":")[2]) < 65534]
        (etc / name).write_text("\n".join(kept) + "\n")
        names = [line.split(":")[0] for line in kept]
        shadow = etc / {"passwd": "shadow", "group": "gshadow"}[name]
        rest = ":*:19000:0:99999:7:::" if name == "passwd" else ":*::"
        shadow.write_text("".join(f"{one}{rest}\n" for one in names))
        shadow.chmod(0o600)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python infra/docker/exercise.py")
    parser.add_argument("--variant", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--keep", type=Path, help="build here, and leave it there")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="exercise-"))
    build = Build(folder, arguments.variant)
    try:
        for word, rest in instructions(DOCKERFILE.read_text()):
            build.do(word, rest)
        size = sum(path.lstat().st_size for path in (folder / "build" / "opt" / "img2parquet").rglob("*"))
        print(f"exercise: {build.ran} instructions done, {size / 1e9:.2f} GB installed")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
