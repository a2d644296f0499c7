# SPDX-License-Identifier: BSD-2-Clause
"""Root disks, kernels and initramfs of dom0 and the guests, from Debian packages.

Theory of operation
-------------------
`build("dom0")`, `build("guest")` and `build("guest612")`, the guest with the 6.12 kernel, each run
mmdebstrap into a directory, add the lab's own files, and turn the directory into an ext4 image with
`mke2fs -d` (no mount, no loop device). The result is a directory in the cache named by a hash over
everything that decides its contents:

    NAME-HASH/root.img     ext4, sparse; never written after the build: runs use qcow2 overlays
    NAME-HASH/vmlinuz      the kernel of the image
    NAME-HASH/initrd.img   busybox and just the modules that reach the root disk
    NAME-HASH/xen.elf      dom0 only: the hypervisor, unpacked, for QEMU's multiboot loader
    NAME-HASH/grub.lnx     guest only: the loader of HVM guests, see `_grub`
    NAME-HASH/about.json   package versions, kernel release

The hash does not cover what the Debian archive holds today: `python -m lab clean` forgets the
images. Downloaded .deb files are kept beside the images. The apt sources and the acquisition
settings (proxies and the like) are this machine's own.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import paths
from .errors import LabError
from .progress import say, step

SUITE = "bookworm"
FORMAT = 1
"""Raise to rebuild every image."""

DISK_SIZE = {"dom0": "6G", "guest": "4G", "guest612": "4G"}

# A guest that differs from "guest" in its kernel alone. The cloud flavour of 6.12 has every module
# that the lab wants, and is a third as large.
KERNEL = {"guest": "linux-image-amd64", "guest612": "linux-image-6.12-cloud-amd64"}

# Parts of the kernel package that no dom0 or guest of the lab can use: half of its 400 MB.
UNUSED_MODULES = (
    "drivers/gpu", "drivers/media", "drivers/infiniband", "drivers/staging", "drivers/iio",
    "drivers/isdn", "drivers/hwmon", "drivers/usb", "drivers/net/wireless",
    "drivers/net/ethernet", "drivers/net/usb", "drivers/net/can", "drivers/bluetooth",
    "drivers/scsi", "drivers/mtd", "drivers/video", "drivers/platform", "drivers/thunderbolt",
    "drivers/firewire", "drivers/comedi", "drivers/mmc", "drivers/leds", "drivers/atm",
    "drivers/message", "drivers/nvme", "drivers/target", "drivers/rtc", "drivers/power",
    "drivers/edac", "drivers/mfd", "drivers/i2c", "drivers/spi", "drivers/hid",
    "drivers/block/floppy", "drivers/ata", "drivers/input", "drivers/parport", "drivers/acpi",
    "drivers/cpufreq", "drivers/crypto", "drivers/pcmcia", "drivers/net/wan",
    "drivers/net/hamradio",
    "sound", "net/bluetooth", "net/mac80211", "net/wireless", "net/can", "net/nfc",
    "fs/btrfs", "fs/ocfs2", "fs/gfs2", "fs/nfs", "fs/nfsd", "fs/smb", "fs/cifs", "fs/ceph",
    "fs/jfs", "fs/reiserfs", "fs/f2fs", "fs/afs", "fs/coda", "fs/dlm", "fs/udf",
)  # fmt: skip

INITRD_MODULES = {
    "dom0": ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic"),
    "guest": ("xen-blkfront", "ext4", "crc32c_generic"),
    "guest612": ("xen-blkfront", "ext4", "crc32c_generic"),
}

REQUIRED_MODULES = {
    "dom0": ("xen-gntdev", "xen-gntalloc", "xen-evtchn", "xen-blkback", "xen-netback", "brd",
             "loop", "dm-delay", "bridge", "tun", "virtio_net"),
    "guest": ("nbd", "xen-gntalloc", "xen-gntdev", "xen-evtchn", "tun", "xen-blkfront",
              "xen-netfront", "overlay", "dm-mod"),
    "guest612": ("nbd", "ublk_drv", "xen-gntalloc", "xen-gntdev", "xen-evtchn", "tun",
                 "xen-blkfront", "xen-netfront", "overlay", "dm-mod"),
}  # fmt: skip

# Units that a test guest does not need and that cost seconds each under emulation.
MASKED_UNITS = (
    "serial-getty@hvc0.service", "getty@tty1.service", "console-getty.service", "getty.target",
    "xen.service", "xendomains.service", "xenconsoled.service", "xenstored.service",
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "systemd-timesyncd.service", "systemd-pstore.service",
    "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
    "systemd-random-seed.service", "systemd-machine-id-commit.service",
    "systemd-firstboot.service", "systemd-hwdb-update.service", "ldconfig.service",
    "systemd-journal-flush.service", "systemd-logind.service", "systemd-user-sessions.service",
    "lvm2-monitor.service", "lvm2-lvmpolld.socket", "blk-availability.service",
    "systemd-tmpfiles-clean.timer", "systemd-binfmt.service", "sys-kernel-debug.mount",
    "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "dev-mqueue.mount",
    "systemd-ask-password-wall.path", "systemd-ask-password-console.path",
    "systemd-remount-fs.service", "systemd-boot-system-token.service", "kmod-static-nodes.service",
    "modprobe@loop.service", "modprobe@dm_mod.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@configfs.service",
    "dbus-org.freedesktop.timesync1.service", "mdcheck_start.timer", "mdcheck_continue.timer",
    "mdmonitor-oneshot.timer",
)  # fmt: skip


@dataclass(frozen=True)
class Image:
    """A built image; every path exists."""

    name: str
    directory: Path

    @property
    def root(self) -> Path:
        return self.directory / "root.img"

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd.img"

    @property
    def grub(self) -> Path:
        return self.directory / "grub.lnx"

    @property
    def xen(self) -> Path:
        return self.directory / "xen.elf"


def packages(name: str) -> list[str]:
    """The package list of an image, from packages-dom0.txt or packages-guest.txt."""
    file = "dom0" if name == "dom0" else "guest"
    lines = (paths.HERE / f"packages-{file}.txt").read_text().splitlines()
    listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if name == "dom0":
        return listed
    return [KERNEL[name] if package == KERNEL["guest"] else package for package in listed]


def fingerprint(name: str) -> str:
    """Hash over what decides an image's contents, 16 hex digits."""
    digest = hashlib.sha256(f"{FORMAT} {SUITE} {name}\n".encode())
    digest.update("\n".join(packages(name)).encode())
    recipe = (GRUB_CONFIG, GRUB_MODULES, DISK_SIZE[name], UNUSED_MODULES, INITRD_MODULES[name],
              REQUIRED_MODULES[name])  # fmt: skip
    digest.update(repr(recipe).encode())
    prefix = ("dom0-", "initramfs-") if name == "dom0" else ("guest-", "lab-", "initramfs-")
    if name != "dom0":
        digest.update(repr(MASKED_UNITS).encode())
    for file in sorted((paths.LAB / "files").iterdir()):
        if file.name.startswith(prefix):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    digest.update((paths.LAB / "agent.py").read_bytes())
    return digest.hexdigest()[:16]


def build(name: str) -> Image:
    """The image `name` ("dom0", "guest", "guest612"), from the cache or built now.

    Raises LabError(image).
    """
    directory = paths.cache() / f"{name}-{fingerprint(name)}"
    if not (directory / "about.json").exists():
        with (paths.cache() / f"{name}.build-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "about.json").exists():
                _require_host_tools()
                with step(f"building the {name} image (minutes; then cached as {directory})"):
                    _build(name, directory)
                _forget_old(name)
    return Image(name, directory)


def _forget_old(name: str) -> None:
    """Keep the two newest images of a name."""
    built = [p for p in paths.cache().glob(f"{name}-*") if (p / "about.json").exists()]
    for path in sorted(built, key=lambda path: path.stat().st_mtime)[:-2]:
        shutil.rmtree(path)


def _require_host_tools() -> None:
    if os.geteuid() != 0:
        raise LabError("image", "mmdebstrap and mke2fs -d need root here: run as root")
    wanted = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "cpio": "cpio",
              "busybox": "busybox-static", "qemu-img": "qemu-utils"}  # fmt: skip
    missing = sorted(package for tool, package in wanted.items() if not shutil.which(tool))
    if missing:
        raise LabError("image", f"not installed: run apt-get install {' '.join(missing)}")


def _run(argv: list[str], log: Path, **environment: str) -> None:
    """Run a build tool with its output in `log`, which an error quotes."""
    with log.open("ab") as out:
        code = subprocess.run(
            argv, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment}, check=False,
        ).returncode  # fmt: skip
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise LabError("image", f"{argv[0]} ended with {code}; log {log}\n{tail}")


def apt_sources() -> str:
    """This machine's own apt sources of the suite, as deb822 or one-line text.

    $PVFRONT_APT_SOURCES may name a file to use instead (a host that is not Debian bookworm).
    """
    override = os.environ.get("PVFRONT_APT_SOURCES")
    if override:
        return Path(override).read_text()
    apt = Path("/etc/apt")
    stanzas: list[str] = []
    for file in sorted(apt.glob("sources.list.d/*.sources")):
        for stanza in re.split(r"\n\s*\n", file.read_text()):
            text = "\n".join(ln for ln in stanza.splitlines() if not ln.startswith("#"))
            suites = re.search(r"^Suites:(.*)$", text, re.MULTILINE)
            enabled = not re.search(r"^Enabled:\s*no", text, re.MULTILINE | re.IGNORECASE)
            if suites and enabled and any(s.startswith(SUITE) for s in suites[1].split()):
                stanzas.append(text.strip())
    if stanzas:
        return "\n\n".join(stanzas) + "\n"
    lines: list[str] = []
    for file in [apt / "sources.list", *sorted(apt.glob("sources.list.d/*.list"))]:
        if file.exists():
            ours = re.compile(rf"deb\s.*\s{SUITE}\S*\s")
            lines += [line for line in file.read_text().splitlines() if ours.match(line)]
    if not lines:
        raise LabError(
            "image",
            f"this machine's apt sources have no {SUITE} suite: point PVFRONT_APT_SOURCES at a "
            "sources.list file that has one",
        )
    return "\n".join(lines) + "\n"


def apt_options() -> list[str]:
    """The host's acquisition settings (proxies, checks), handed to mmdebstrap's apt."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True).stdout
    pattern = r"Acquire::(http|https|ftp|Retries|Check-|Max-|ForceIPv)"
    wanted = [ln for ln in dump.splitlines() if re.match(pattern, ln) and '""' not in ln]
    return [f"--aptopt={line.rstrip(';')}" for line in wanted]


def _build(name: str, directory: Path) -> None:
    cache = paths.cache()
    debs = cache / "debs"
    debs.mkdir(exist_ok=True)
    log = cache / f"{name}-build.log"
    log.write_bytes(b"")
    work = Path(tempfile.mkdtemp(prefix=f"{name}-build-", dir=cache))
    try:
        tree, out = work / "tree", work / "out"
        out.mkdir()
        (work / "sources").write_text(apt_sources())
        with step(f"{name}: mmdebstrap, {len(packages(name))} packages and what they need"):
            _mmdebstrap(name, tree, work / "sources", debs, log)
        release = _kernel_release(tree)
        _check_modules(name, tree, release)
        _populate(name, tree)
        with step(f"{name}: kernel {release}, initramfs, ext4 image"):
            shutil.copy(tree / "boot" / f"vmlinuz-{release}", out / "vmlinuz")
            _initramfs(name, tree, release, work / "initramfs", out / "initrd.img", log)
            if name == "dom0":
                (xen,) = (tree / "boot").glob("xen-*-amd64.gz")
                (out / "xen.elf").write_bytes(gzip.decompress(xen.read_bytes()))
            else:
                _grub(tree, out / "grub.lnx", log)
            shutil.rmtree(tree / "boot")
            (tree / "boot").mkdir()
            journal = ["-O", "^has_journal"] if name == "dom0" else []
            _run(["mke2fs", "-q", "-t", "ext4", *journal, "-L", f"lab-{name}", "-m", "0",
                  "-E", "lazy_itable_init=1,lazy_journal_init=1", "-d", str(tree),
                  str(out / "root.img"), DISK_SIZE[name]], log)  # fmt: skip
        status = subprocess.run(
            ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W",
             "-f", "${Package} ${Version}\n"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        versions = dict(line.split(" ", 1) for line in status.splitlines())
        about = {"kernel": release, "packages": versions}
        (out / "about.json").write_text(json.dumps(about, indent=1))
        shutil.rmtree(directory, ignore_errors=True)
        out.rename(directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _mmdebstrap(name: str, tree: Path, sources: Path, debs: Path, log: Path) -> None:
    excluded = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"]
    excluded += [f"/lib/modules/*/kernel/{part}*" for part in UNUSED_MODULES]
    archives = "/var/cache/apt/archives"
    _run(["mmdebstrap", "--mode=root", "--variant=apt", f"--include={','.join(packages(name))}",
          *apt_options(), *[f"--dpkgopt=path-exclude={path}" for path in excluded],
          "--dpkgopt=force-unsafe-io", "--skip=essential/unlink",
          f'--setup-hook=mkdir -p "$1"{archives}', f"--setup-hook=sync-in {debs} {archives}",
          f"--customize-hook=sync-out {archives} {debs}",
          SUITE, str(tree), str(sources)],
         log, INITRD="No", DEBIAN_FRONTEND="noninteractive")  # fmt: skip
    for stray in (debs / "lock", debs / "partial"):
        shutil.rmtree(stray, ignore_errors=True) if stray.is_dir() else stray.unlink(True)


def _kernel_release(tree: Path) -> str:
    releases = sorted(path.name for path in (tree / "lib/modules").iterdir())
    if len(releases) != 1:
        raise LabError("image", f"expected one kernel in the image, found {releases}")
    return releases[0]


def _check_modules(name: str, tree: Path, release: str) -> None:
    modules = tree / "lib/modules" / release
    _run(["chroot", str(tree), "depmod", release], paths.cache() / f"{name}-build.log")
    built_in = (modules / "modules.builtin").read_text() + (modules / "modules.dep").read_text()
    have = {Path(ln.split(":")[0]).name.split(".ko")[0].replace("_", "-")
            for ln in built_in.splitlines()}  # fmt: skip
    missing = [m for m in REQUIRED_MODULES[name] if m.replace("_", "-") not in have]
    if missing:
        raise LabError("image", f"kernel {release} lacks {', '.join(missing)}")


def _initramfs(name: str, tree: Path, release: str, stage: Path, out: Path, log: Path) -> None:
    """busybox, the modules of INITRD_MODULES with what they depend on, in loading order."""
    for folder in ("bin", "modules", "dev"):
        (stage / folder).mkdir(parents=True)
    shutil.copy(tree / "bin/busybox", stage / "bin/busybox")
    shutil.copy(paths.LAB / "files/initramfs-init", stage / "init")
    (stage / "init").chmod(0o755)
    os.mknod(stage / "dev/console", 0o20600, os.makedev(5, 1))
    base = tree / "lib/modules" / release
    depends: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (base / "modules.dep").read_text().splitlines():
        module, _, rest = line.partition(":")
        depends[module] = rest.split()
        by_name[Path(module).name.split(".ko")[0].replace("_", "-")] = module
    order: list[str] = []

    def visit(module: str) -> None:
        if module not in order:
            for dependency in depends[module]:
                visit(dependency)
            order.append(module)

    for wanted in INITRD_MODULES[name]:
        if wanted.replace("_", "-") in by_name:  # else: built in
            visit(by_name[wanted.replace("_", "-")])
    for module in order:
        data = (base / module).read_bytes()
        # Busybox's insmod wants them plain.
        plain = lzma.decompress(data) if module.endswith(".xz") else data
        (stage / "modules" / Path(module).name.removesuffix(".xz")).write_bytes(plain)
    names = [Path(module).name.removesuffix(".xz") for module in order]
    (stage / "modules/order").write_text("".join(f"{name}\n" for name in names))
    # Not compressed: unpacking a compressed one costs an emulated CPU more than reading it.
    archive = f"cd {stage} && find . | LC_ALL=C sort | cpio -o -H newc --quiet >{out}"
    _run(["sh", "-c", archive], log)


GRUB_CONFIG = "search --no-floppy --set=root --file /grub.cfg\nconfigfile /grub.cfg\n"
GRUB_MODULES = ("biosdisk", "tar", "search", "search_fs_file", "configfile", "linux", "normal",
                "boot")  # fmt: skip


def _grub(tree: Path, out: Path, log: Path) -> None:
    """GRUB as a "Linux kernel" of 140 KB that reads /grub.cfg from whatever disk has it.

    An HVM guest's firmware reads a kernel given to QEMU byte by byte through an I/O port (on Xen
    fw_cfg has no DMA): for 13 MB that is half a minute under emulation, more than all the rest of
    the boot. This loader is small, and reads the kernel from a disk with DMA.
    """
    (tree / "tmp/grub.cfg").write_text(GRUB_CONFIG)
    _run(["chroot", str(tree), "grub-mkimage", "-O", "i386-pc", "-p", "/", "-c", "/tmp/grub.cfg",
          "-o", "/tmp/core.img", *GRUB_MODULES], log)  # fmt: skip
    head = (tree / "usr/lib/grub/i386-pc/lnxboot.img").read_bytes()
    out.write_bytes(head + (tree / "tmp/core.img").read_bytes())
    for name in ("grub.cfg", "core.img"):
        (tree / "tmp" / name).unlink()


def _install(tree: Path, source: str, target: str, mode: int = 0o755) -> None:
    path = tree / target.lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(paths.LAB / source, path)
    path.chmod(mode)


def _populate(name: str, tree: Path) -> None:
    """The lab's own files in the tree."""
    _install(tree, "agent.py", "/lab/agent.py")
    (tree / "etc/hostname").write_text(f"{name}\n")
    (tree / "etc/hosts").write_text(f"127.0.0.1 localhost {name}\n")
    (tree / "etc/resolv.conf").unlink(missing_ok=True)
    (tree / "etc/resolv.conf").write_text("")
    (tree / "etc/fstab").write_text("")
    shutil.rmtree(tree / "var/lib/apt/lists", ignore_errors=True)
    for deb in (tree / "var/cache/apt").rglob("*.*"):
        if deb.is_file():
            deb.unlink()
    if name == "dom0":
        _install(tree, "files/dom0-rc", "/lab/rc")
        _install(tree, "files/dom0-inittab", "/etc/inittab", 0o644)
        return
    _install(tree, "files/guest-net", "/lab/guest-net")
    _install(tree, "files/guest-payload", "/lab/guest-payload")
    system = tree / "etc/systemd/system"
    _install(tree, "files/lab-agent.service", "/etc/systemd/system/lab-agent.service", 0o644)
    wants = system / "sysinit.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "lab-agent.service").symlink_to("../lab-agent.service")
    for unit in MASKED_UNITS:
        path = system / unit
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    default = system / "default.target"
    default.unlink(missing_ok=True)
    default.symlink_to("/lib/systemd/system/multi-user.target")
    # A machine id of its own in the image: no first-boot work at every start of an overlay.
    machine_id = hashlib.sha256(b"pvfront lab guest").hexdigest()[:32]
    (tree / "etc/machine-id").write_text(machine_id + "\n")
    journald = tree / "etc/systemd/journald.conf.d"
    journald.mkdir(exist_ok=True)
    (journald / "lab.conf").write_text("[Journal]\nStorage=volatile\nRateLimitBurst=0\n")
    # Root without a password on a test guest: `xl console` can be used where a getty is started.
    shadow = tree / "etc/shadow"
    shadow.write_text(re.sub(r"^root:[^:]*:", "root::", shadow.read_text(), flags=re.MULTILINE))


def clean() -> None:
    """Forget every cached image (not the .deb files)."""
    for path in paths.cache().iterdir():
        if re.fullmatch(r"(dom0|guest|guest612)-([0-9a-f]{16}|build-.*)", path.name):
            say(f"removing {path}")
            shutil.rmtree(path)
