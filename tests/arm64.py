"""The quick tests on an emulated 64-bit ARM, whose SIMD row is "neon": `python tests/arm64.py`, as root on Debian.

    python tests/arm64.py                                   all quick tests of the CPU; hours
    python tests/arm64.py tests/test_simd.py -- -k load     a part of them
    python tests/arm64.py --cpu cortex-a72                  an older CPU, without arithmetic in float16

Needs Debian's debootstrap, qemu-user-static and busybox-static, an index that pip can reach, and a gigabyte for the
root folder, which is made once. Nothing is mounted, no kernel module is loaded, and no program of the root runs while
it is made. Each file of tests is one emulated pytest, which writes a journal: a run that was broken off goes on where
it stopped. A test that kills its process, or hangs, is counted as crashed and the rest goes on. An edit of any file
begins a new journal.

docs/arm64.md says what runs and what does not. Exit status 1 if a test fails.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import journal
from versions import requirements

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
RELEASE, PYTHON = "bookworm", "3.11"  # of Debian, and the Python that it has
QEMU, SHELL = "/usr/bin/qemu-aarch64-static", "/bin/busybox"  # this machine's own, static: they run in the root, too
PACKAGES = "python3,libgomp1,libstdc++6"
TAGS = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)] + ["manylinux2014_aarch64"]

# Places in the root folder.
WHEELS, SOURCES, KERNELS, JOURNALS = "opt/wheels", "opt/numba_attn", "var/cache/kernels", "var/journals"


class Cpu(NamedTuple):
    """What /proc/cpuinfo of this CPU says. LLVM reads the CPU's name and features there, and QEMU does not write it."""

    part: str
    features: str


BASE = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
CPUS = {
    "neoverse-n1": Cpu("0xd0c", f"{BASE} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"),
    "cortex-a72": Cpu("0xd08", BASE),
}


def mirror() -> list[str]:
    """Where this machine's apt has the release from, as arguments of debootstrap; nothing for debootstrap's default."""
    if asked := os.environ.get("DEBIAN_MIRROR"):
        return [asked]
    wanted = ["Created-By: Packages", "Label: Debian", f"Codename: {RELEASE}", "Component: main"]
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[:1]


def qemu_version() -> str:
    return subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def make_root(finished: Path) -> None:
    """Debian's packages and the wheels, unpacked."""
    if (finished / WHEELS).exists():
        return
    root = finished.with_name(finished.name + ".part")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    options = ["--arch=arm64", "--foreign", "--variant=minbase", "--force-check-gpg", f"--include={PACKAGES}"]
    subprocess.run(["debootstrap", *options, RELEASE, str(root), *mirror()], check=True, stdout=subprocess.DEVNULL)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        # tar, since dpkg-deb's own extraction puts a folder in place of the link from /lib to /usr/lib.
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacked:
            tar = ["tar", "-x", "-C", str(root), "--keep-directory-symlink"]
            subprocess.run(tar, check=True, stdin=unpacked.stdout)
        package.unlink()
    if (root / "proc").is_symlink():  # where debootstrap may not mount; inside the root it would lead to itself
        (root / "proc").unlink()
    for program in (QEMU, SHELL):
        shutil.copy(program, root / program.lstrip("/"))
    # Without binfmt_misc the kernel executes nothing of the root's but this: sys.executable, for tests that start it.
    start = root / "usr/bin/python"
    start.write_text(f'#!{SHELL} sh\nexec {QEMU} -0 /usr/bin/python /usr/bin/python3 "$@"\n', encoding="utf-8")
    start.chmod(0o755)
    for place in (SOURCES, KERNELS, JOURNALS, "proc"):
        (root / place).mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-compile", "--only-binary=:all:"]
    command += [f"--python-version={PYTHON}", "--implementation=cp", *(f"--platform={tag}" for tag in TAGS)]
    # pip reads an environment marker for the machine that it runs on. What has one is x86's: tbb.
    command += [f"--target={root / WHEELS}", *(wanted for wanted in requirements() if ";" not in wanted)]
    subprocess.run(command, check=True)
    root.rename(finished)  # refused where there is something else


def copy_sources(root: Path) -> str:
    """The files of the repository, copied; a digest of them and of the wheels' names."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    shutil.rmtree(root / SOURCES)
    digest = hashlib.sha256(" ".join(versions(root)).encode())
    for name in sorted(name for name in names if name and (ROOT / name).is_file()):
        to = root / SOURCES / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to)
        digest.update(name.encode() + to.read_bytes())
    return digest.hexdigest()[:12]


def versions(root: Path) -> list[str]:
    found = sorted(p.name.removesuffix(".dist-info") for p in (root / WHEELS).glob("*.dist-info"))
    return [f"Python-{PYTHON}", *found]


def choose_cpu(root: Path, cpu: str) -> None:
    """Two cores of it in /proc/cpuinfo."""
    core = "processor : {}\nFeatures : {features}\nCPU implementer : 0x41\nCPU architecture : 8\nCPU part : {part}\n\n"
    text = "".join(core.format(n, **CPUS[cpu]._asdict()) for n in range(2))
    (root / "proc/cpuinfo").write_text(text, encoding="utf-8")


def emulated(root: Path, cpu: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The root's Python with these arguments, its output in a log."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "QEMU_CPU": cpu,
        "PYTHONPATH": f"/{WHEELS}:/{SOURCES}:/{SOURCES}/tests",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NUMBA_ATTN_CACHE_DIR": f"/{KERNELS}",
        **{name: value for name, value in os.environ.items() if name in ("NUMBA_ATTN_TEST_SEED", "NUMBA_NUM_THREADS")},
    }
    inside = f'cd /{SOURCES} && exec python "$@"'
    command = ["nice", "chroot", str(root), SHELL, "sh", "-c", inside, "sh", *arguments]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


class Settings(NamedTuple):
    cpu: str
    digest: str
    patience: float
    pytest: list[str]


def run_file(root: Path, file: str, settings: Settings) -> Counter[str]:
    """All tests of a file that its journal does not have yet; how many had each outcome."""
    folder = root / JOURNALS / f"{settings.cpu}-{settings.digest}"
    folder.mkdir(exist_ok=True)
    lines = folder / f"{Path(file).stem}.jsonl"
    log = lines.with_suffix(".log")
    plugin = ["-p", "journal", f"--journal=/{lines.relative_to(root)}", "-p", "no:cacheprovider"]
    while True:
        process = emulated(root, settings.cpu, ["-m", "pytest", "-q", "--quick", *plugin, file, *settings.pytest], log)
        watch(process, lines, settings.patience)
        started = [test for test, record in journal.outcomes(lines).items() if record["outcome"] == "started"]
        if not started:
            break
        for test in started:
            text = f"exit status {process.returncode}; {log}"
            journal.append(lines, test=test, outcome="crashed", text=text)
    count = Counter(record["outcome"] for record in journal.outcomes(lines).values())
    if process.returncode not in (0, 1, 5):  # 5: nothing left to run
        count["crashed"] += 1
        print(f"{file}: exit status {process.returncode}; {log}", flush=True)
    seconds = sum(float(record.get("seconds", 0)) for record in journal.outcomes(lines).values())
    print(f"{file:40}" + "".join(f"{count[word]:>9}" for word in WORDS) + f"{seconds:>9.0f}", flush=True)
    for test, record in journal.outcomes(lines).items():
        if record["outcome"] in ("failed", "crashed"):
            print(f"    {record['outcome']} {test}: {record['text'].strip().splitlines()[-1]}", flush=True)
        elif record["outcome"] == "skipped":
            count[f"skipped: {record['text']}"] += 1
    return count


WORDS = ("passed", "failed", "crashed", "skipped")


def watch(process: subprocess.Popen[bytes], lines: Path, patience: float) -> None:
    """Until the process ends; it is killed if no test ends for `patience` seconds."""
    start = time.time()
    while True:
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            last = max(start, lines.stat().st_mtime if lines.exists() else 0)
            if time.time() - last > patience:
                process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=CACHE / "numba-attn-arm64", help="folder (default: %(default)s)")
    parser.add_argument("--cpu", choices=CPUS, default="neoverse-n1", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="files of tests at once (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=3600, help="seconds that a test may take (%(default)s)")
    parser.add_argument("tests", nargs="*", help="files (default: all but the GPU's); behind --, what pytest is given")
    own, behind = sys.argv[1:], []
    if "--" in own:
        own, behind = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    if os.geteuid():
        parser.error("chroot and debootstrap need root")
    if missing := [name for name in (QEMU, SHELL, "debootstrap", "chroot") if not shutil.which(name)]:
        parser.error(f"not found: {', '.join(missing)}; apt-get install debootstrap qemu-user-static busybox-static")
    root = options.root.resolve()
    make_root(root)
    digest = copy_sources(root)
    choose_cpu(root, options.cpu)
    print(f"{options.cpu} emulated by {qemu_version()}; {', '.join(versions(root))}; journals of {digest}", flush=True)
    print(f"{'':40}" + "".join(f"{word:>9}" for word in (*WORDS, "seconds")), flush=True)
    files = options.tests or [f"tests/{p.name}" for p in sorted((ROOT / "tests").glob("test_*.py"))]
    with ThreadPoolExecutor(options.jobs) as pool:
        counts = list(
            pool.map(lambda file: run_file(root, file, Settings(options.cpu, digest, options.patience, behind)), files)
        )
    total = sum(counts, Counter[str]())
    print(f"{'in all':40}" + "".join(f"{total[word]:>9}" for word in WORDS))
    for word, number in total.most_common():
        if word.startswith("skipped: "):
            print(f"{number:6} {word}")
    return int(total["failed"] + total["crashed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
