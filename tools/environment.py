#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Check this machine, then make one of the virtual environments of the Makefile, unless it is there already.

`python3 tools/environment.py demo|test|opencv-4.5|opencv-4.6` prints one line with its cure for each thing that is
missing and exits 1, or makes the environment and exits 0. The stamp of a finished environment is written last, so that
an interrupted installation is done again; it holds a hash of everything that decides what is installed.

Only the standard library, and no syntax newer than Python 3.6: it must be able to say that Python is too old.
"""

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Dict, List, NamedTuple, Optional, Tuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NEWEST_ROS_WHEEL = (3, 13)
PIP = "pip==26.3"  # the one that Ubuntu 22.04 brings knows neither --dry-run nor --report
EGL_PACKAGES = "libegl1 libgl1 libgl1-mesa-dri libgles2"


class Environment(NamedTuple):
    """What one environment is made of: `extras` of setup.py and `requirements`, under `constraints`.

    `bare` packages come without their dependencies, and a `slim` environment without compiled copies and C++ headers:
    onnxruntime would bring sympy (90 MB), which only its conversion tools import.
    """

    folder: str
    extras: Tuple[str, ...]
    requirements: Tuple[str, ...]
    constraints: Tuple[str, ...]
    newest_python: Tuple[int, int]
    disk_mb: int
    renders: bool = False
    torch: bool = False
    ros: bool = False
    bare: Tuple[str, ...] = ()
    slim: bool = False
    download_mb: int = 100


def opencv_environment(version: str) -> Environment:
    """Describe the environment of an old OpenCV; its numpy 1.26 has no wheel for a Python newer than 3.12."""
    wanted = ("numpy", "opencv-python-headless", "PyYAML")
    return Environment(
        ".venv-opencv-" + version, (), wanted, ("opencv-%s.txt" % version,), (3, 12), 500, download_mb=70
    )


ENVIRONMENTS: Dict[str, Environment] = {
    "demo": Environment(
        ".venv-demo",
        ("demo",),
        (),
        ("python.txt",),
        NEWEST_ROS_WHEEL,
        900,
        ros=True,
        bare=("onnxruntime",),
        slim=True,
        download_mb=150,
    ),
    "test": Environment(
        ".venv",
        ("train", "onnxruntime", "demo", "test"),
        (),
        ("python.txt",),
        (3, 12),
        4000,
        True,
        True,
        True,
        download_mb=600,
    ),
    "opencv-4.5": opencv_environment("4.5"),
    "opencv-4.6": opencv_environment("4.6"),
}


# ---- what is missing -------------------------------------------------------------------------------------------


def sourced_ros() -> Optional[str]:
    """Return the distribution whose setup file is sourced, or None."""
    return os.environ.get("ROS_DISTRO") or None


def python_problems(wanted: Environment) -> List[str]:
    """Check the interpreter: version, kind, venv."""
    problems = []
    version = sys.version_info[:2]
    if not (3, 10) <= version <= wanted.newest_python:
        problems.append(
            "Python %d.%d is not supported by '%s' (3.10 to %d.%d are): install one and name it, for instance "
            "'make PYTHON=python3.11 ...'." % (version + (wanted.folder,) + wanted.newest_python)
        )
    if platform.python_implementation() != "CPython":
        problems.append("%s is not supported: use CPython ('make PYTHON=...')." % platform.python_implementation())
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        problems.append(
            "The Python module venv or ensurepip is missing: 'sudo apt-get install python%d.%d-venv' (or python3-venv)."
            % version
        )
    return problems


def ros_problems(wanted: Environment) -> List[str]:
    """Check that ROS 2 is sourced and importable, or else that its wheels run here."""
    if not wanted.ros:
        return []
    if sourced_ros():
        if importlib.util.find_spec("rclpy") is None:
            return [
                "ROS 2 '%s' is sourced, but %s cannot import its rclpy: name the system's Python ('make "
                "PYTHON=/usr/bin/python3 ...') or use a shell without ROS sourced." % (sourced_ros(), sys.executable)
            ]
        return []
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return [
            "The ROS 2 wheels exist for x86-64 Linux only, and this is %s on %s: install ROS 2 (docs.ros.org), source "
            "its setup file and run make again." % (platform.system(), platform.machine())
        ]
    if platform.libc_ver()[0] != "glibc":
        return ["The ROS 2 wheels need glibc, which this system does not use: choose a Debian or Ubuntu machine."]
    return []


def disk_problems(wanted: Environment) -> List[str]:
    """Check the free disk space where the environment goes."""
    free_mb = shutil.disk_usage(ROOT).free // 1000000
    if free_mb >= wanted.disk_mb:
        return []
    words = "%s needs %d MB of disk and %d MB are free: make room on the disk of %s."
    return [words % (wanted.folder, wanted.disk_mb, free_mb, ROOT)]


def egl_problems(wanted: Environment) -> List[str]:
    """Check that a headless OpenGL display can be opened: the libraries, and a driver behind them."""
    if not wanted.renders:
        return []
    cure = "'sudo apt-get install %s'." % EGL_PACKAGES
    missing = []
    for name in ("libEGL.so.1", "libGL.so.1"):
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    if missing:
        return ["The renderer needs %s: %s" % (" and ".join(missing), cure)]
    if not _egl_display_opens():
        return ["The renderer finds no EGL driver (a GPU's, or Mesa's software one): " + cure]
    return []


def _egl_display_opens() -> bool:
    """Open the first EGL device's display, as the renderer will."""
    egl = ctypes.CDLL("libEGL.so.1")
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int(0)
    prototype = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    if not prototype(query)(16, ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    egl.eglInitialize.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    egl.eglTerminate.argtypes = [ctypes.c_void_p]
    platform_device = 0x313F
    for device in devices[: count.value]:
        display = get_display(platform_device, device, None)
        if display and egl.eglInitialize(display, None, None):
            egl.eglTerminate(display)
            return True
    return False


# ---- making it -------------------------------------------------------------------------------------------------


def plan(wanted: Environment) -> Tuple[List[str], List[str]]:
    """Return pip's requirements and constraint files, by whether ROS 2 is sourced."""
    constraints, extras = list(wanted.constraints), list(wanted.extras)
    if wanted.ros:
        constraints.append("system-ros.txt" if sourced_ros() else "wheels.txt")
        extras += [] if sourced_ros() else ["ros-wheels"]
    requirements = list(wanted.requirements)
    if extras:
        requirements += ["--editable", "%s[%s]" % (ROOT, ",".join(extras))]
    return requirements, [os.path.join(ROOT, "constraints", name) for name in constraints]


def fingerprint(wanted: Environment) -> str:
    """Hash everything that decides what is installed: pins, requirements, Python, ROS, the torch index, this file."""
    requirements, constraints = plan(wanted)
    state = {
        "python": [sys.version, os.path.realpath(sys.executable)],
        "folder": os.path.join(ROOT, wanted.folder),
        "requirements": requirements,
        "ros": sourced_ros(),
        "torch_index": os.environ.get("TORCH_INDEX_URL") if wanted.torch else None,
    }
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for path in constraints + [os.path.join(ROOT, name) for name in ("setup.py", "setup.cfg", "tools/environment.py")]:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def is_ready(wanted: Environment) -> bool:
    """Tell whether the environment is there, complete and what this checkout asks for."""
    try:
        with open(os.path.join(ROOT, wanted.folder, "ukd-stamp")) as file:
            return file.read() == fingerprint(wanted)
    except OSError:
        return False


def make(wanted: Environment) -> None:
    """Make the environment from nothing; CalledProcessError when pip fails."""
    folder = os.path.join(ROOT, wanted.folder)
    say(
        "making %s with Python %s%s (downloads about %d MB)"
        % (wanted.folder, platform.python_version(), _ros_words(wanted), wanted.download_mb)
    )
    system = ["--system-site-packages"] if wanted.ros and sourced_ros() else []
    subprocess.check_call([sys.executable, "-m", "venv", "--clear"] + system + [folder])
    pip = [os.path.join(folder, "bin", "python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    subprocess.check_call(pip + ["install", PIP])
    requirements, constraints = plan(wanted)
    limits = [word for path in constraints for word in ("--constraint", path)]
    limits += ["--no-compile"] if wanted.slim else []
    if wanted.torch:
        install_torch(pip, limits)
    subprocess.check_call(pip + ["install"] + limits + requirements)
    if wanted.bare:
        subprocess.check_call(pip + ["install", "--no-deps"] + limits + list(wanted.bare))
    if wanted.slim:
        slim_down(folder)
    stamp = os.path.join(folder, "ukd-stamp")
    with open(stamp + ".new", "w") as file:
        file.write(fingerprint(wanted))
    os.replace(stamp + ".new", stamp)  # last: only a finished environment has one


def slim_down(folder: str) -> None:
    """Drop what running never reads: headers, pip, and copies (the ROS wheels hold some libraries eight times)."""
    python = os.path.join(folder, "bin", "python")
    subprocess.check_call([python, "-m", "pip", "-qq", "uninstall", "--yes", "pip"])
    shutil.rmtree(os.path.join(folder, "include"), ignore_errors=True)
    first: Dict[str, str] = {}
    for root, _, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in names if ".so" in name):
            if os.path.islink(path) or os.path.getsize(path) < 100000:
                continue
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            original = first.setdefault(digest, path)
            if original != path:
                os.link(original, path + ".new")
                os.replace(path + ".new", path)


def install_torch(pip: List[str], limits: List[str]) -> None:
    """Say which build of torch comes from where, then install it; a build for CUDA brings gigabytes along."""
    index = os.environ.get("TORCH_INDEX_URL")
    source = ["--index-url", index] if index else []
    words = ["install", "torch"] + limits + source
    found = subprocess.run(
        pip + words + ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-"],
        stdout=subprocess.PIPE,
        check=True,
    )
    package = json.loads(found.stdout.decode())["install"][0]
    version, url = package["metadata"]["version"], package["download_info"]["url"]
    cuda = any("nvidia" in need or "cuda" in need for need in package["metadata"].get("requires_dist", []))
    say("torch %s from %s" % (version, "a local file" if url.startswith("file:") else index or "pip's index"))
    if cuda:
        say(
            "this build of torch downloads about 3 GB of CUDA libraries and takes 8 GB of disk; for a machine without "
            "an NVIDIA GPU stop now and run 'make TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu ...' (200 MB)"
        )
        need = ENVIRONMENTS["test"]._replace(disk_mb=9000)
        for problem in disk_problems(need):
            raise SystemExit("ukd_ros: " + problem)
    subprocess.check_call(pip + words)


def _ros_words(wanted: Environment) -> str:
    if not wanted.ros:
        return ""
    return ", on the sourced ROS 2 '%s'" % sourced_ros() if sourced_ros() else ", with the ROS 2 Jazzy wheels"


def say(line: str) -> None:
    """Print one line at once, so that it stands before pip's."""
    sys.stdout.write("ukd_ros: %s\n" % line)
    sys.stdout.flush()


def main(arguments: List[str]) -> int:
    """Check and make the environment named on the command line; return the exit status."""
    if len(arguments) != 1 or arguments[0] not in ENVIRONMENTS:
        sys.stderr.write("usage: environment.py %s\n" % "|".join(ENVIRONMENTS))
        return 2
    wanted = ENVIRONMENTS[arguments[0]]
    ready = not python_problems(wanted) and is_ready(wanted)
    problems = python_problems(wanted) + ros_problems(wanted) + egl_problems(wanted)
    problems += [] if ready else disk_problems(wanted)
    for problem in problems:
        sys.stderr.write("ukd_ros: %s\n" % problem)
    if problems:
        return 1
    if ready:
        return 0
    try:
        make(wanted)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(
            "ukd_ros: %s was not finished (exit status %s of the command above the message of pip or venv): see that "
            "message, check the network or pip's index, and run make again.\n" % (wanted.folder, error.returncode)
        )
        return 1
    size = subprocess.check_output(["du", "-sm", os.path.join(ROOT, wanted.folder)]).decode().split()[0]
    say("%s is ready (%s MB)" % (wanted.folder, size))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
