"""A short run of the campaign in fuzz.py, and what its children must notice."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).resolve().parents[1] / "support"
# number -> what a task does, what must be noticed
TASKS = {
    "return 'fine'": "",
    "raise ValueError('wrong')": "ValueError",
    "os.abort()": "crash, exit code -6",
    "os.system('true')": "os.system",
    "time.sleep(60)": "hang",
    "bytearray(700 << 20)": "memory grew",
    "bytearray(99 << 30)": "MemoryError",
    "print('\\x1b[31m')": "prints",
    "os.write(2, '\\x9b2J'.encode())": "prints",
    "open('/etc/passwd').read()": "reads /etc/passwd",
    "open(room / '..' / 'x', 'w')": "writes",
    "(room / 'a.bin').write_bytes(b''); open(room / 'a.bin')": "opens",
    "import pickle; pickle.loads(b'cos\\nsystem\\n.')": "pickle.find_class",
    "import socket; socket.create_connection(('127.0.0.1', 9))": "socket",
}
PROGRAM = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
import children

def task(room, number):
    found = {}
    exec("def work(room):\\n    " + tasks[number], globals(), found)
    return found["work"](room) or "done"

tasks = json.loads(sys.argv[2])
hangs = [number for number, code in enumerate(tasks) if "sleep" in code]
others = [number for number in range(len(tasks)) if number not in hangs]
results = children.campaign(task, others, limit_s=30) + children.campaign(task, hangs, limit_s=2)
print(json.dumps({result.number: result.defect for result in results}))
"""


def test_children_notice_what_a_task_does():
    """In a process of its own: a fork of one in which mlx has computed may hang."""
    arguments = [sys.executable, "-c", PROGRAM, str(HERE), json.dumps(list(TASKS))]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, check=True)
    defects = json.loads(done.stdout)
    assert len(defects) == len(TASKS)
    for number, (task, wanted) in enumerate(TASKS.items()):
        assert wanted in defects[str(number)] and bool(wanted) == bool(defects[str(number)]), task


def test_an_input_is_the_same_every_time(tmp_path):
    for name in ("plain", "again"):
        (tmp_path / name).mkdir()
    outcomes = []
    fuzz.make_bases(tmp_path / "plain")
    for turn in range(2):
        (room := tmp_path / "again" / str(turn)).mkdir()
        outcomes.append(fuzz.attempt(tmp_path / "plain", 0, room, 2 * len(fuzz.PARSERS)))
        content = (room / "model" / fuzz.PARSERS["safetensors"][1]).read_bytes()
        outcomes[-1] += str(hash(content))
    assert outcomes[0] == outcomes[1]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    fuzz.make_bases(root)
    return root


@settings(max_examples=130, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), number=st.integers(0, len(fuzz.PARSERS) - 1))
def test_mutated_input_is_refused_or_works(bases, tmp_path_factory, seed, number):
    room = tmp_path_factory.mktemp("room")
    assert fuzz.attempt(bases, seed, room, number)
