"""Start a Docker engine of our own, and leave nothing of it: for machines on which none runs. Linux, as root."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time

import system_packages

PACKAGES = {  # package: the program that is missing without it, and what for
    "docker.io": ("dockerd", "the stack's tests run containers"),
    "iptables": ("iptables-save", "Docker's engine connects containers with it"),
    "iproute2": ("ip", "the engine's interfaces are removed with it"),
    "mmdebstrap": ("mmdebstrap", "it makes base images where none can be pulled"),
}
# Debian's client: another one on PATH may be too old for the engine or lack BuildKit.
CLIENT = "/usr/bin/docker"
START_S = 60
STOP_S = 30
FORWARDING = "/proc/sys/net/ipv4/ip_forward"
# Of unix sockets' addresses at most 107 characters count, so the engine's folder has a short path.
FOLDERS, PREFIX = "/var/tmp", "glimpse-dk"
ENOUGH_MEMORY = 12 << 30  # for files of 5 GB and containers of 3
LISTERS = ("iptables-save", "ip6tables-save")
RECORD = "before.json"  # in the engine's folder: what was there before, for a later run if this one is killed
BRIDGES = r"docker0|br-[0-9a-f]{12}"  # Docker's names: an operator's may be br-lan


class NoEngine(Exception):
    """No engine can be started on this machine; the message says why."""


class Engine:
    """A context: the engine that runs on this machine already, or one of our own that ends with the block.

    Raises NoEngine on entering.
    """

    def __init__(self):
        self.address = ""  # as in DOCKER_HOST
        self.is_ours = False
        self.folder = ""  # of one of our own: its files, and room for others that go with it
        self._process = None
        self._rules = {}  # of iptables, before the engine came, by the command that lists them
        self._interfaces = set()  # Docker's before the engine came
        self._forwarding = ""

    def __enter__(self):
        running = answering("unix:///var/run/docker.sock")
        if not running:
            install_packages(os.geteuid())
            running = answering("unix:///var/run/docker.sock")
        if running:
            self.address = "unix:///var/run/docker.sock"
            return self
        self._begin()
        return self

    def __exit__(self, *_):
        if self.is_ours:
            self._end()

    def docker(self, *arguments, **options):
        """Run the client. Raises subprocess.CalledProcessError."""
        environment = {**os.environ, "DOCKER_HOST": self.address, "DOCKER_BUILDKIT": "1"}
        return subprocess.run([client(), *arguments], env=environment, check=True, text=True, **options)

    def said(self, *arguments):
        """What the client prints."""
        return self.docker(*arguments, stdout=subprocess.PIPE).stdout.strip()

    def remove_files(self):
        """Remove the folder of an engine of our own."""
        if self.folder:
            remove_folder(self.folder)

    def left_over(self):
        """Whatever is still there after the end, one line each."""
        found = []
        if self.is_ours:
            if self._process is not None and self._process.poll() is None:
                found.append(f"dockerd runs still, process {self._process.pid}")
            found += [f"the interface {name}" for name in interfaces() - self._interfaces]
            if os.path.exists(self.folder):
                found.append(f"the folder {self.folder}")
            for lister, before in self._rules.items():
                found += [f"{lister}: {rule}" for rule in added_rules(lister, before)]
        return found

    def _begin(self):
        self.is_ours = True
        remove_what_killed_runs_left()
        self.folder = tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS)
        os.chmod(self.folder, 0o711)
        if free_memory() >= ENOUGH_MEMORY:
            mount_memory(self.folder)
        self._interfaces = interfaces()
        self._rules = {lister: rules(lister) for lister in LISTERS}
        with open(FORWARDING, encoding="ascii") as value:
            self._forwarding = value.read()
        write_record(self.folder, self._rules, self._interfaces, self._forwarding)
        self.address = f"unix://{self.folder}/docker.sock"
        command = [
            "setpriv", "--pdeathsig", "TERM",  # so that a killed test leaves no engine that runs
            "dockerd", "--data-root", self.folder + "/data", "--exec-root", self.folder + "/exec",
            "--pidfile", self.folder + "/pid", "--host", self.address,
        ]  # fmt: skip
        log_path = self.folder + "/log"
        try:
            with open(log_path, "wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            wait_until_it_answers(self.address, self._process, log_path)
        except OSError as exc:
            self._end()
            raise NoEngine(f"dockerd cannot be started: {exc}") from exc
        except BaseException:
            self._end()
            raise

    def _end(self):
        """Stop the engine; take away its folder, its interfaces and its packet rules."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self.remove_files()
        remove_interfaces(interfaces() - self._interfaces)
        for lister, before in self._rules.items():
            restore(lister, before)
        restore_forwarding(self._forwarding)


def wait_until_it_answers(address, process, log_path):
    """Raises NoEngine with the end of its log."""
    deadline = time.monotonic() + START_S
    while not answering(address):
        if process.poll() is not None or time.monotonic() > deadline:
            with open(log_path, encoding="utf-8", errors="replace") as log:
                raise NoEngine(f"dockerd did not start within {START_S} s: {last_words(log.read())}")
        time.sleep(0.5)


def client():
    return CLIENT if os.path.exists(CLIENT) else shutil.which("docker") or CLIENT


def answering(address):
    """Whether an engine answers at this address."""
    if not os.path.exists(address.removeprefix("unix://")) or not os.path.exists(client()):
        return False
    environment = {**os.environ, "DOCKER_HOST": address}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return subprocess.call([client(), "version"], env=environment, timeout=10, **quiet) == 0
    except subprocess.TimeoutExpired:
        return False


def install_packages(user_id):
    """Raises NoEngine."""
    if user_id != 0:
        raise NoEngine("only root can start one, and none runs: start Docker, or run this as root")
    missing = {package: purpose for package, (program, purpose) in PACKAGES.items() if shutil.which(program) is None}
    if missing:
        try:
            system_packages.install(missing, user_id)
        except system_packages.NotInstalled as exc:
            raise NoEngine(f"{', '.join(missing)}: not installed, and {exc.fault}. {exc.remedy}") from exc


def last_words(log):
    lines = [line for line in log.splitlines() if "level=info" not in line] or log.splitlines()
    return " | ".join(lines[-3:])


def remove_what_killed_runs_left():
    """Remove folders, interfaces and packet rules of engines that run no more, if no other engine runs either.

    Interfaces and rules go only by the record of a folder: without one, nobody knows whose they are.
    """
    folders = [os.path.join(FOLDERS, name) for name in os.listdir(FOLDERS) if name.startswith(PREFIX)]
    folders = [folder for folder in folders if is_roots(folder)]
    if not folders or "dockerd" in programs():
        return
    for folder in folders:
        record = read_record(folder)
        remove_folder(folder)
        if record is not None:
            remove_interfaces(interfaces(BRIDGES) - set(record["interfaces"]))  # a veth may be of something else
            for lister, before in record["rules"].items():
                restore(lister, before)
            restore_forwarding(record["forwarding"])


def restore_forwarding(before):
    with contextlib.suppress(OSError):
        with open(FORWARDING, encoding="ascii") as value:
            if value.read() == before:
                return
        with open(FORWARDING, "w", encoding="ascii") as value:
            value.write(before)


def is_roots(folder):
    """Whether root alone writes there: anyone may make a folder of this name in FOLDERS."""
    status = os.lstat(folder)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == 0 and not status.st_mode & 0o022


def write_record(folder, before, links, forwarding):
    with open(os.path.join(folder, RECORD), "w", encoding="utf-8") as file:
        json.dump({"rules": before, "interfaces": sorted(links), "forwarding": forwarding}, file)


def read_record(folder):
    """What `write_record` wrote; None if there is nothing whole."""
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def programs():
    """The names of all that runs."""
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/comm", encoding="utf-8", errors="replace") as name:
            found.add(name.read().strip())
    return found


def remove_folder(folder):
    for mount in sorted(mounts_below(folder), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", folder], check=False, stderr=subprocess.DEVNULL)  # a tenth of shutil's CPU time


def free_memory():
    """Bytes that processes and files in memory could still have."""
    with open("/proc/meminfo", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) << 10


def mount_memory(folder):
    """Hold the folder's files in memory: images are built in half the time, and removed in none. It may fail."""
    command = ["mount", "-t", "tmpfs", "-o", "mode=711,size=8g", "tmpfs", folder]
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)


def mounts_below(folder):
    with open("/proc/mounts", encoding="utf-8") as mounts:
        return [line.split()[1] for line in mounts if (line.split()[1] + "/").startswith(folder + "/")]


def interfaces(names=rf"{BRIDGES}|veth[0-9a-f]{{7}}"):
    """Docker's: a bridge for each network, and one for each container, which a stopped build leaves."""
    return {name for name in os.listdir("/sys/class/net") if re.fullmatch(names, name)}


def remove_interfaces(names):
    for name in names:
        subprocess.run(["ip", "link", "delete", name], check=False, stderr=subprocess.DEVNULL)


def rules(lister):
    """The rules as iptables-save prints them, each with its table before it: "nat -A POSTROUTING ..."."""
    done = subprocess.run([lister], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    found, table = [], ""
    for line in done.stdout.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(("-A", ":")):
            found.append(f"{table} {line.partition(' [')[0]}")  # without the counters
    return found


def is_dockers(rule):
    """Whether Docker's engine makes rules and chains like this one."""
    return re.search(rf"[ :]DOCKER|[ !](-i|-o) ({BRIDGES}) ", rule + " ") is not None


def added_rules(lister, before):
    """Docker's rules that were not there before; and FORWARD's policy if that was ACCEPT and is DROP now."""
    was_open = "filter :FORWARD ACCEPT" in before
    return [
        rule
        for rule in rules(lister)
        if rule not in before and (is_dockers(rule) or (was_open and rule == "filter :FORWARD DROP"))
    ]


def restore(lister, before):
    """Delete what the engine added: rules first, then its chains; give FORWARD its policy back."""
    program = lister.removesuffix("-save")
    added = [rule.split(" ", 1) for rule in added_rules(lister, before)]

    def change(table, *arguments):
        command = [program, "-t", table, *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    for table, rule in added:
        if rule.startswith("-A"):
            change(table, "-D", *shlex.split(rule)[1:])
        elif rule == ":FORWARD DROP":
            change(table, "-P", "FORWARD", "ACCEPT")
    chains = [(table, rule[1:].split()[0]) for table, rule in added if rule.startswith(":DOCKER")]
    for option in ("-F", "-X"):
        for table, chain in chains:
            change(table, option, chain)
