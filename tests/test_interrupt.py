"""Ctrl-C during a generation. Timed out once on a very slow machine; not settled whether the test or the program is at fault."""
import signal
import subprocess

from conftest import FIXTURES, ROOT

MODEL = FIXTURES / "mamba_tied.f32.bin"


def test_interrupt_keeps_the_text_and_saves_the_state(mamba, tmp_path):
    state = tmp_path / "s.state"
    run = subprocess.Popen([ROOT / "mamba", MODEL, "--ids", "5 6", "--print-ids", "-n", "100000000", "-s", "1", "--save-state", state],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)  # no buffer that communicate() would not see
    first = b""
    while len(first) < 200:
        first += run.stdout.read(200)
    run.send_signal(signal.SIGINT)
    rest, _ = run.communicate(timeout=60)
    ids = (first + rest).decode().split()
    assert run.returncode == 130 and len(ids) > 10
    more = mamba(MODEL, "--load-state", state, "--print-ids", "-n", 5, "-s", 1).stdout.decode().split()
    whole = mamba(MODEL, "--ids", "5 6", "--print-ids", "-n", len(ids) + 5, "-s", 1).stdout.decode().split()
    assert ids + more == whole
