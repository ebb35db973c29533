"""The examples of README that spread lines over processes and machines, run as they stand there. Part of `make check`.

Every byte is compared with a single process."""
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import PROGRAM, ROOT, run_mamba

README = (ROOT / "README.md").read_text()
TALES = ROOT / "models" / "tales.bin"


def example(language, word):
    """The code block of README in this language that holds this word."""
    (block,) = [b for b in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if word in b]
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model.bin, a thousand short requests, and what one process answers; `mamba` is on PATH."""
    folder = tmp_path_factory.mktemp("cluster")
    shutil.copy(TALES, folder / "model.bin")
    with open(folder / "requests.jsonl", "w") as f:
        for i in range(1000):
            f.write(json.dumps({"id": i, "prompt": ["Once upon a time", "The little dog", "Tom \u00e9 \U0001f600"][i % 3], "max_tokens": 10 + i % 30, "seed": i}) + "\n")
    (folder / "expected").write_bytes(run_mamba(folder / "model.bin", "--jsonl", input=(folder / "requests.jsonl").read_bytes()).stdout)
    return folder


def environment(**more):
    return {**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}", **more}


def test_parallel(folder):
    if not shutil.which("parallel"):
        pytest.skip("GNU parallel is not installed")
    subprocess.run(["bash", "-ec", example("sh", "parallel")], cwd=folder, env=environment(), check=True)
    assert (folder / "answers.jsonl").read_bytes() == (folder / "expected").read_bytes()


def test_slurm(folder):
    """The array's variables set by hand, for an array that does not begin at 0; every task is a process of its own."""
    script = example("sh", "SLURM")
    for task in range(3, 10):
        subprocess.run(["bash", "-ec", script], cwd=folder, check=True,
                       env=environment(SLURM_ARRAY_TASK_ID=str(task), SLURM_ARRAY_TASK_MIN="3", SLURM_ARRAY_TASK_COUNT="7"))
    parts = sorted(folder.glob("answers.*.jsonl"))
    assert len(parts) == 7 and min(len(p.read_bytes()) for p in parts) > 0
    assert b"".join(p.read_bytes() for p in parts) == (folder / "expected").read_bytes()


def executors():
    """Process ids of Spark's executors, two of them in local-cluster mode."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"CoarseGrainedExecutorBackend" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass  # it has ended meanwhile
    return found


def test_spark(folder, tmp_path):
    """A cluster of two workers, one of which is killed in the middle of the job."""
    pyspark = pytest.importorskip("pyspark")
    if not shutil.which("java"):
        pytest.skip("java is not installed")
    job = example("python", "pyspark")
    for place, here in (("/usr/local/bin/mamba", PROGRAM), ("/data/model.bin", folder / "model.bin")):
        assert place in job
        job = job.replace(place, str(here))
    (folder / "job.py").write_text(job)
    home = pathlib.Path(pyspark.__file__).parent
    out, log = tmp_path / "answers", tmp_path / "log"
    job = subprocess.Popen([home / "bin" / "spark-submit", "--master", "local-cluster[2,1,1024]", "--conf", "spark.ui.enabled=false",
                            folder / "job.py", folder / "requests.jsonl", out], cwd=folder, stdout=subprocess.DEVNULL, stderr=open(log, "wb"),
                           env=environment(SPARK_HOME=str(home), PYSPARK_PYTHON=sys.executable, SPARK_LOCAL_IP="127.0.0.1", SPARK_WORKER_DIR=str(tmp_path)))
    killed = False
    while job.poll() is None:
        done = len(list(out.glob("_temporary/0/task_*"))) if out.exists() else 0  # tasks that have ended
        if not killed and 2 <= done <= 12 and len(executors()) == 2:
            os.kill(executors()[0], signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    text = log.read_text(errors="replace")
    assert job.returncode == 0, text[-5000:]
    assert killed and "Command exited with code 137" in text, "no executor was killed in the middle of the job"
    assert b"".join(p.read_bytes() for p in sorted(out.glob("part-*"))) == (folder / "expected").read_bytes()
