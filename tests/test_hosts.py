# pytest tests/test_hosts.py
"""Two machines, for real but for the cable: network namespaces of this one, each with a name, an
address and processes of its own, and a link that can be cut."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import repo
    from plumbing import machines, ranks

    ranks.SILENCE, machines.SECONDS_TO_SEE = 4, 2  # not a minute
    code = repo.main()
    sys.stdout.flush()
    os._exit(code)

import pytest
from conftest import ROOT, read_jsonl
from test_ranks import FEW, assert_same_metrics, assert_same_models, by_ranks  # noqa: F401
from torch.distributed.checkpoint.api import CheckpointException

from plumbing import machines, ranks, settings
from plumbing.checkpoints import checkpoints_in, damage_of
from plumbing.errors import UserError, blame

LIMIT = 600  # seconds; more than enough beside a dozen busy processes, too
LOST = r"error: rank \d has lost another rank; .*"


class Host:
    """One of the two; number is 1 or 2."""

    def __init__(self, number: int, folder: Path):
        self.number = number
        self.name = f"repo-{os.getpid()}-{number}"
        self.device = f"repo{os.getpid() % 10**7}-{number}"  # 15 characters at most
        self.names = folder / f"hosts-of-{number}"
        self.names.write_text("127.0.0.1 localhost\n10.77.0.1 host-1\n10.77.0.2 host-2\n")

    def start(self, *flags, before: str = "true", script: Path = Path(__file__)):
        """torchrun, in a shell that has its own host name and files mounted for it alone."""
        enter = (f"echo host-{self.number} > /proc/sys/kernel/hostname; "
                 f'mount --bind {self.names} /etc/hosts; {before}; exec "$@"')
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount",
             "sh", "-ec", enter, "sh", sys.executable, "-m", "torch.distributed.run",
             "--nnodes", "2", "--node_rank", str(self.number - 1), "--master_addr", "host-1",
             script, *FEW, *map(str, flags)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def ended(self) -> str:
        """What its processes have printed."""
        printed, _ = self.process.communicate(timeout=LIMIT)
        return printed

    def link(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.name, "link", "set", self.device, state], check=True)

    def kill(self) -> None:
        """All its processes at once, as when the power fails."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        subprocess.run(["kill", "-KILL", *listed.stdout.split()], stderr=subprocess.DEVNULL)


@pytest.fixture
def hosts(tmp_path, family):
    one, two = Host(1, tmp_path), Host(2, tmp_path)
    try:
        for words in (
            f"netns add {one.name}",
            f"netns add {two.name}",
            f"link add {one.device} netns {one.name} type veth "
            f"peer name {two.device} netns {two.name}",
            f"-n {one.name} address add 10.77.0.1/24 dev {one.device}",
            f"-n {two.name} address add 10.77.0.2/24 dev {two.device}",
            f"-n {one.name} link set lo up",
            f"-n {two.name} link set lo up",
            f"netns exec {one.name} unshare --uts --mount true",
        ):
            try:
                subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                pytest.skip(f"no network namespaces can be made here: {str(reason).strip()}")
        for host in (one, two):
            host.link("up")
        yield one, two
    finally:
        for host in (one, two):
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], stderr=subprocess.DEVNULL)


def start_both(hosts, *flags, **options) -> None:
    for host in hosts:
        host.start(*flags, **options)


def wait_for_steps(out: Path, steps: int) -> None:
    deadline, file = time.monotonic() + LIMIT, out / "metrics.jsonl"
    while not file.exists() or len(read_jsonl(file)) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- a machine is lost


def check_that_it_ended_with_a_sentence(host: Host) -> None:
    printed = host.ended()
    assert host.process.returncode == 1
    assert len(re.findall(LOST, printed)) == 1, printed
    assert "[rank" not in printed  # no traceback of a rank


@pytest.mark.exhaustive
def test_a_cut_link_ends_both_and_resumed_they_end_where_they_would_have(
    hosts, by_ranks, tmp_path  # noqa: F811
):
    out = tmp_path / "out"
    flags = ("--output_dir", out, "--save_every", 1, "--keep_checkpoints", 9)
    start_both(hosts, *flags)
    wait_for_steps(out, 2)
    hosts[0].link("down")
    cut = time.monotonic()
    for host in hosts:
        check_that_it_ended_with_a_sentence(host)
    print(f"both have ended {time.monotonic() - cut:.1f} seconds after the cut")

    left = checkpoints_in(out)
    assert left and all(damage_of(folder) is None for folder in left)
    assert not list(out.rglob(".*")) and not (out / "final").exists()

    hosts[0].link("up")
    start_both(hosts, *flags, "--resume", script=ROOT / "repo.py")  # as in plumbing/README.md
    printed = [host.ended() for host in hosts]
    assert [host.process.returncode for host in hosts] == [0, 0], printed
    assert "continuing from" in printed[0] and "4 steps of repo in" in printed[0]
    assert "policy" not in printed[1]  # the first machine speaks
    assert not list(out.rglob(".*"))
    assert_same_metrics(by_ranks.folder / "full", out)
    assert_same_models(by_ranks.folder / "full", out)


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_when_all_processes_of_one_die_the_other_ends(hosts, tmp_path, victim):
    out = tmp_path / "out"
    start_both(hosts, "--steps", 5000, "--output_dir", out)
    wait_for_steps(out, 2)
    hosts[victim].kill()
    check_that_it_ended_with_a_sentence(hosts[1 - victim])


# ---- a machine that does not fit


def refusal(hosts) -> str:
    """The one sentence that both say."""
    printed = [host.ended() for host in hosts]
    assert all(host.process.returncode == 1 for host in hosts)  # torchrun's
    [sentence], [same] = (re.findall("error: .*", text) for text in printed)
    assert sentence == same and "[rank" not in "".join(printed)
    return sentence


@pytest.mark.exhaustive
def test_a_machine_with_other_settings_is_refused(hosts, tmp_path):
    hosts[0].start("--output_dir", tmp_path / "out")
    hosts[1].start("--output_dir", tmp_path / "out", "--kl_coeff", 0.7)
    assert "rank 1 has --kl_coeff 0.7, rank 0 0.2; all machines need" in refusal(hosts)
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("file, says", [
    ("{ROOT}/plumbing/reports.py", "rank 1 has plumbing/reports.py "),
    ("{FAMILY}/train.jsonl", "rank 1 has prompts and PTX pairs "),
])
def test_a_machine_with_other_code_or_data_is_refused(hosts, family, tmp_path, file, says):
    file = Path(file.format(ROOT=ROOT, FAMILY=Path(family["policy"]).parent))
    other = tmp_path / "other"  # lacks the last line
    other.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    hosts[0].start("--output_dir", tmp_path / "out")
    hosts[1].start("--output_dir", tmp_path / "out", before=f"mount --bind {other} {file}")
    assert says in refusal(hosts)
    assert not (tmp_path / "out").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("has_own", [False, True])
def test_a_folder_that_only_one_machine_sees_is_refused(hosts, tmp_path, has_own):
    shared, out = tmp_path / "shared", tmp_path / "shared" / "out"
    shared.mkdir()
    before = f"mount -t tmpfs none {shared}" + (f"; mkdir {out}" if has_own else "")
    hosts[0].start("--output_dir", out)
    hosts[1].start("--output_dir", out, before=before)
    assert f"--output_dir {out}: rank 1 does not see what rank 0 writes there" in refusal(hosts)
    assert not out.exists()


# ---- the same in one process


@pytest.fixture
def second_rank(monkeypatch):
    """second_rank(has): what from_all_ranks() gives then, beside what this process has."""
    monkeypatch.setattr(machines, "RANKS", 2)

    def set_up(**others):
        def from_all_ranks(mine: dict) -> dict:
            if 0 in mine and isinstance(mine[0], dict):
                return mine | {1: mine[0] | others}
            return mine
        monkeypatch.setattr(machines, "from_all_ranks", from_all_ranks)

    return set_up


@pytest.mark.parametrize("others, says", [
    ({}, None),
    ({"--batch_size": "8"}, "rank 1 has --batch_size 8, rank 0 16; all machines need the same"),
    ({"repo.py": "0badc0de"}, "rank 1 has repo.py 0badc0de, rank 0 "),
    ({"kernels/new.py": "0badc0de"}, "rank 1 has kernels/new.py 0badc0de, rank 0 None"),
    ({"prompts and PTX pairs": "00000000"}, "prompts and PTX pairs 00000000, rank 0 12345678"),
    ({"torch": "1.0"}, "rank 1 has torch 1.0, rank 0 2"),
])
def test_what_differs_is_named(second_rank, tmp_path, others, says):
    second_rank(**others)
    config = settings.RunSettings(output_dir=str(tmp_path))
    config.batch_size = 16
    if says is None:
        machines.check_machines("123456789", config)
    else:
        with pytest.raises(UserError, match=re.escape(says)) as raised:
            machines.check_machines("123456789", config)
        assert raised.value.on_all_ranks
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_rank_does_not_see_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "from_all_ranks",
                        lambda mine: mine | {1: False} if mine[0] is True else mine)
    with pytest.raises(UserError, match="rank 1 does not see what rank 0 writes") as raised:
        machines.check_shared(tmp_path)
    assert raised.value.on_all_ranks and not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the options are Linux's")
def test_the_kernel_is_asked_to_end_connections_that_have_been_silent():
    def asked(connection) -> list[int]:
        options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL,
                   socket.TCP_KEEPCNT)
        keeps = connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        return [keeps, *(connection.getsockopt(socket.IPPROTO_TCP, each) for each in options)]

    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert asked(client)[:2] == [0, 0]
        ranks.end_silent_connections()
        keeps, sent, idle, interval, count = asked(client)
        assert keeps == 1 and sent == 1000 * ranks.SILENCE
        assert idle + interval * count == ranks.SILENCE  # where nothing is sent
        client.sendall(b"it still works")
        assert server.accept()[0].recv(100) == b"it still works"


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_a_rank_lost_while_a_file_is_written_is_no_full_disk(in_checkpoint):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection timed out")
    error = CheckpointException("save", {0: (lost, None)}) if in_checkpoint else lost
    with pytest.raises(RuntimeError) as raised, blame("step-2: cannot be written"):
        raise error
    assert raised.value is lost and ranks.has_lost_a_rank(lost)
    with pytest.raises(UserError, match="cannot be written"), blame("step-2: cannot be written"):
        raise RuntimeError("no space left")
