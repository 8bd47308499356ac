"""Start a Docker engine of our own, and leave nothing of it: for machines on which none runs. Linux, as root."""

import os
import shutil
import signal
import subprocess
import tempfile
import time

import system_packages

PACKAGES = {
    "docker.io": "the stack's tests run containers",
    "iptables": "Docker's engine connects containers with it",
    "mmdebstrap": "it makes base images where none can be pulled",
}
# Debian's client: another one on PATH may be too old for the engine or lack BuildKit.
CLIENT = "/usr/bin/docker"
START_S = 60
STOP_S = 30
FORWARDING = "/proc/sys/net/ipv4/ip_forward"


class NoEngine(Exception):
    """No engine can be started on this machine; the message says why."""


class Engine:
    """A context: the engine that runs on this machine already, or one of our own that ends with the block.

    Raises NoEngine on entering.
    """

    def __init__(self):
        self.address = ""  # as in DOCKER_HOST
        self.is_ours = False
        self._folder = ""
        self._process = None
        self._rules = {}  # of iptables, before the engine came, by the command that lists them
        self._interfaces = set()  # Docker's bridges before the engine came
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

    def left_over(self):
        """Whatever is still there after the end, one line each."""
        found = []
        if self.is_ours:
            if self._process is not None and self._process.poll() is None:
                found.append(f"dockerd runs still, process {self._process.pid}")
            found += [f"the bridge {bridge}" for bridge in bridges() - self._interfaces]
            if os.path.exists(self._folder):
                found.append(f"the folder {self._folder}")
            for lister, before in self._rules.items():
                found += [f"{lister}: {rule}" for rule in rules(lister) if rule not in before and is_dockers(rule)]
        return found

    def _begin(self):
        self.is_ours = True
        # A short path: the address of a unix socket has at most 107 characters.
        self._folder = tempfile.mkdtemp(prefix="dk", dir="/var/tmp")
        self._interfaces = bridges()
        self._rules = {lister: rules(lister) for lister in ("iptables-save", "ip6tables-save")}
        with open(FORWARDING, encoding="ascii") as value:
            self._forwarding = value.read()
        self.address = f"unix://{self._folder}/docker.sock"
        command = [
            "dockerd", "--data-root", self._folder + "/data", "--exec-root", self._folder + "/exec",
            "--pidfile", self._folder + "/pid", "--host", self.address,
        ]  # fmt: skip
        log_path = self._folder + "/log"
        try:
            with open(log_path, "wb") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            wait_until_it_answers(self.address, self._process, log_path)
        except BaseException:
            self._end()
            raise

    def _end(self):
        """Stop the engine; take away its folder, its bridge and its packet rules."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        for mount in sorted(mounts_below(self._folder), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self._folder, ignore_errors=True)
        for bridge in bridges() - self._interfaces:
            subprocess.run(["ip", "link", "delete", bridge], check=False, stderr=subprocess.DEVNULL)
        for lister, before in self._rules.items():
            restore(lister, before)
        if self._forwarding:
            with open(FORWARDING, "w", encoding="ascii") as value:
                value.write(self._forwarding)


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
    programs = {"docker.io": "dockerd", "iptables": "iptables-save", "mmdebstrap": "mmdebstrap"}
    missing = {package: PACKAGES[package] for package, program in programs.items() if shutil.which(program) is None}
    if missing:
        try:
            system_packages.install(missing, user_id)
        except system_packages.NotInstalled as exc:
            raise NoEngine(f"{', '.join(missing)}: not installed, and {exc.fault}. {exc.remedy}") from exc


def last_words(log):
    lines = [line for line in log.splitlines() if "level=info" not in line] or log.splitlines()
    return " | ".join(lines[-3:])


def mounts_below(folder):
    with open("/proc/mounts", encoding="utf-8") as mounts:
        return [line.split()[1] for line in mounts if line.split()[1].startswith(folder + "/")]


def bridges():
    """Docker's: docker0, and one for each network."""
    return {name for name in os.listdir("/sys/class/net") if name == "docker0" or name.startswith("br-")}


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
    return "DOCKER" in rule or "docker0" in rule or " br-" in rule or rule == "filter :FORWARD DROP"


def restore(lister, before):
    """Delete what the engine added: rules first, then its chains; give FORWARD its policy back."""
    program = lister.removesuffix("-save")
    added = [rule.split(" ", 1) for rule in rules(lister) if rule not in before and is_dockers(rule)]

    def change(table, *arguments):
        command = [program, "-t", table, *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)

    for table, rule in added:
        if rule.startswith("-A"):
            change(table, "-D", *rule.split()[1:])
        elif rule == ":FORWARD DROP":
            change(table, "-P", "FORWARD", "ACCEPT")
    chains = [(table, rule[1:].split()[0]) for table, rule in added if rule.startswith(":DOCKER")]
    for option in ("-F", "-X"):
        for table, chain in chains:
            change(table, option, chain)
