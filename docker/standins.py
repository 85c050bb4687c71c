"""Stand-ins for NVIDIA's images and packages, where no registry can be reached.

Bases are Debian systems made by mmdebstrap, with the names of the real ones. Packages of NVIDIA are small `.deb` files
in a signed repository on this machine, or small wheels. Real are: Debian's packages, the CUDA compiler and the TensorRT
headers (from wheels of PyPI), and everything that pip installs into the image.
"""

from __future__ import annotations

import gzip
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

DEBIAN, MIRROR = "bookworm", "http://deb.debian.org/debian"
LOCAL_VERSION = "+standin"  # of wheels, so that pip cannot take the real ones
SUITE = "standin"
MULTIARCH = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
# The CUDA compiler and headers, and the TensorRT headers.
CUDA_WHEELS = ("nvidia-cuda-nvcc>=13,<14", "nvidia-cuda-runtime>=13,<14", "nvidia-cuda-cccl>=13,<14")
HEADER_WHEEL = "kernel-lens==2.0.1"
BINDINGS = '"""A stand-in for TensorRT that has only a version."""\n__version__ = {!r}\n'
METADATA = "Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"


def run(*command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its standard output; on failure, raise an error with all of its output."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        output = f"{done.stdout}\n{done.stderr}".strip()
        raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}:\n{output[-6000:]}")
    return done.stdout


# --- wheels and packages ----------------------------------------------------------------------------------------------


def make_wheel(folder: Path, name: str, version: str) -> Path:
    """Write a wheel of a distribution that contains the module `tensorrt`."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    files = {
        "tensorrt/__init__.py": BINDINGS.format(version.removesuffix(LOCAL_VERSION)),
        f"{info}/METADATA": METADATA.format(name=name, version=version),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: standins\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    path = folder / f"{stem}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name_in_wheel, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name_in_wheel, text)
    return path


@dataclass(frozen=True, kw_only=True)
class Package:
    """A Debian package.

    Attributes:
        name, version: As `apt-get install name=version` takes them.
        files: Contents: paths in the system, with a text or a file or folder to copy.
    """

    name: str
    version: str
    files: Mapping[str, str | Path]


def make_deb(folder: Path, package: Package) -> Path:
    """Write the `.deb` of a package."""
    tree = folder / f"{package.name}.tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name, content in package.files.items():
        target = tree / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            target.write_text(content, encoding="utf-8")
        elif content.is_dir():
            shutil.copytree(content, target)
        else:
            shutil.copy(content, target)
    (tree / "DEBIAN").mkdir(parents=True, exist_ok=True)
    (tree / "DEBIAN/control").write_text(_control(package), encoding="utf-8")
    path = folder / f"{package.name}.deb"
    run("dpkg-deb", "--build", "--root-owner-group", tree, path)
    shutil.rmtree(tree)
    return path


def _control(package: Package) -> str:
    return (
        f"Package: {package.name}\nVersion: {package.version}\nArchitecture: all\n"
        "Maintainer: yolov7-deploy <tests@localhost>\nDescription: stand-in for a package of the vendor\n"
    )


def tensorrt_packages(version: str, *, arch: str, headers: Path, library: Path) -> list[Package]:
    """Return stand-ins for the packages of TensorRT: real headers, an empty library, and bindings with a version."""
    short = version.partition("-")[0]
    soname = f"so.{short.partition('.')[0]}"
    lib, site = f"/usr/lib/{MULTIARCH[arch]}", "/usr/lib/python3/dist-packages"
    return [
        Package(name="libnvinfer-headers-dev", version=version, files={f"/usr/include/{MULTIARCH[arch]}": headers}),
        Package(
            name="tensorrt-libs",
            version=version,
            files={f"{lib}/libnvinfer.{soname}": library, f"{lib}/libnvonnxparser.{soname}": library},
        ),
        Package(
            name="python3-libnvinfer",
            version=version,
            files={
                f"{site}/tensorrt/__init__.py": BINDINGS.format(short),
                f"{site}/tensorrt-{short}.dist-info/METADATA": METADATA.format(name="tensorrt", version=short),
            },
        ),
    ]


def make_library(folder: Path, name: str) -> Path:
    """Compile an empty shared library with this soname."""
    path = folder / name
    run("gcc", "-shared", "-nostdlib", "-o", path, f"-Wl,-soname,{name}", "-x", "c", "/dev/null")
    return path


def install_wheels(folder: Path, wheels: Sequence[str]) -> Path:
    """Install wheels of PyPI into a folder, without what they depend on beyond the list."""
    run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, *wheels)
    return folder


# --- repository -------------------------------------------------------------------------------------------------------


class Repository:
    """A signed apt repository of packages.

    Args:
        folder: A new folder.
        packages: Its contents.
        arch: `amd64` or `arm64`.

    Attributes:
        fingerprint: Fingerprint of its key, which is `key.asc`.
    """

    def __init__(self, folder: Path, packages: Sequence[Package], *, arch: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        index = "".join(self._add(package) for package in packages)
        release = folder / "dists" / SUITE
        binary = release / "main" / f"binary-{arch}"
        binary.mkdir(parents=True)
        (binary / "Packages").write_text(index, encoding="utf-8")
        (binary / "Packages.gz").write_bytes(gzip.compress(index.encode(), mtime=0))
        (release / "Release").write_text(_release_text(release, arch), encoding="utf-8")
        self.fingerprint = self._sign(release)

    def _add(self, package: Package) -> str:
        path = make_deb(self.folder, package)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return f"{_control(package)}Filename: {path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n\n"

    def _sign(self, release: Path) -> str:
        home = self.folder / "gnupg"
        home.mkdir(mode=0o700)
        gpg = ("gpg", "--homedir", home, "--batch", "--passphrase", "")
        run(*gpg, "--quick-generate-key", "stand-in", "default", "default", "never")
        run(*gpg, "--clearsign", "--output", release / "InRelease", release / "Release")
        run(*gpg, "--armor", "--output", self.folder / "key.asc", "--export")
        listed = run(*gpg, "--list-keys", "--with-colons")
        run("gpgconf", "--homedir", home, "--kill", "all")
        return next(line.split(":")[9] for line in listed.splitlines() if line.startswith("fpr:"))


def _release_text(release: Path, arch: str) -> str:
    files = sorted(path for path in release.rglob("*") if path.is_file())
    sums = "".join(
        f" {hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.relative_to(release)}\n"
        for path in files
    )
    return (
        f"Origin: stand-in\nSuite: {SUITE}\nCodename: {SUITE}\nArchitectures: {arch}\nComponents: main\nSHA256:\n{sums}"
    )


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine only, and yield its address."""
    handler = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


# --- bases ------------------------------------------------------------------------------------------------------------


# As in Docker's official images of Debian and Ubuntu, apt keeps no packages and no caches.
APT_CLEAN = """Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Update::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
"""


def make_base(tar: Path, *, arch: str, include: Sequence[str] = ()) -> Path:
    """Make a minimal Debian system with some more packages."""
    options = [f"--include={','.join(include)}"] if include else []
    clean = tar.with_suffix(".conf")
    clean.write_text(APT_CLEAN, encoding="utf-8")
    options.append(f"--customize-hook=upload {clean} /etc/apt/apt.conf.d/docker-clean")
    run("mmdebstrap", "--variant=minbase", f"--architectures={arch}", *options, DEBIAN, tar, MIRROR)
    return tar
