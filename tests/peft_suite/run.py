"""Run PEFT's own tests with both LoRETTA methods in their matrices: ``make test-peft``.

Downloads the source distribution of peft once (its wheel has no tests), checks it against the digest below, writes the
tiny models that the tests ask for, and runs the five files in two processes. Further arguments go to pytest, for
example ``-k merge``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
FILES = [
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
]
HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "peft_suite"


def fetch_sources() -> Path:
    """The unpacked source distribution, its `tests` made a package (the archive lacks `__init__.py`)."""
    archive = CACHE / f"peft-{VERSION}.tar.gz"
    if not archive.exists():
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft", f"peft=={VERSION}"]
        subprocess.run([sys.executable, *command, "--dest", str(CACHE)], check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{archive} has the SHA-256 {digest}, expected {SHA256}: delete it and run again")
    sources = CACHE / f"peft-{VERSION}"
    if not sources.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(CACHE, filter="data")
    (sources / "tests" / "__init__.py").touch()
    return sources


def main(arguments: list[str]) -> int:
    installed = importlib.metadata.version("peft")
    if installed != VERSION:
        raise SystemExit(f"peft {installed} is installed, these are the tests of {VERSION}")
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = fetch_sources()
    hub = CACHE / "hub"
    environment = os.environ | {
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "TOKENIZERS_PARALLELISM": "false",
    }
    subprocess.run([sys.executable, "-m", "tiny_hub", str(hub)], check=True, env=environment)
    options = ["-p", "plugin", "-c", str(HERE / "pytest.ini"), "--rootdir", str(sources), "-n", "2", "-q"]
    files = [f"tests/{name}" for name in FILES]
    command = [sys.executable, "-m", "pytest", *options, *(arguments or []), *files]
    return subprocess.run(command, cwd=sources, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
