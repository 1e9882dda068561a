"""A plugin for pytest: the tests of llama.cpp's server, asked of `hae serve`.

The tests themselves come from llama.cpp's sources, which `cargo xtask serve upstream` fetches. They start a server
with models that are fetched from the network; here they get models that are at hand, and where those
count or write differently, what the tests expect is changed (`edits.json`). Tests of what is not here are left out,
and tests of what differs on purpose have to fail, each with its reason (`reasons.json`).

Environment: HAE the program, HAE_VISION a text model and HAE_MMPROJ its vision file, HAE_TEXT a text
model with a true tokenizer and template, HAE_RESULTS a file for what came of each test, HAE_PICTURES two
pictures with a colon between them.
"""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import requests

HERE = Path(__file__).parent
REASONS = json.loads((HERE / "reasons.json").read_text(encoding="utf-8"))
PICTURES = os.environ["HAE_PICTURES"].split(os.pathsep)

# The models of the tests, by the names that they have on the hub.
TEXT = "ggml-org/test-model-stories260K"
VISION = "ggml-org/tinygemma3-GGUF:Q8_0"

# llama-server's flags that hae serve has no use for: models are files here, each server has one.
DROPPED_WITH_VALUE = {"--hf-repo", "--hf-file", "--model-url", "--mmproj-url"}
DROPPED = {"--offline", "--no-mmproj"}

# The tests fetch models with it, which is not needed here.
sys.modules.setdefault("wget", types.ModuleType("wget"))

results = {}


def command(args, repo):
    """`hae serve` in the place of llama-server, with a model that is here."""
    out, rest = [], iter(args[1:])
    for arg in rest:
        if arg in DROPPED_WITH_VALUE:
            next(rest)
        elif arg == "--context-shift":
            out += ["--kv-policy", "context_shift"]
        elif arg not in DROPPED:
            out.append(arg)
    if repo == VISION:
        model = ["-m", os.environ["HAE_VISION"]]
        if "--no-mmproj" not in args:
            model += ["--mmproj", os.environ["HAE_MMPROJ"]]
    else:
        model = ["-m", os.environ["HAE_TEXT"]]
    return [os.environ["HAE"], "serve", "-t", os.environ.get("HAE_THREADS", "2"), *model, *out]


def reason_of(nodeid):
    """The kind and the reason of a test that does not pass, by the longest name that it begins with."""
    name = nodeid.split("unit/", 1)[-1]
    found = [key for key in REASONS if name.startswith(key)]
    return REASONS[max(found, key=len)] if found else None


def pytest_configure(config):
    import utils

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    # The tests' own cache of models would be there.
    Path("tmp").mkdir(exist_ok=True)
    start = utils.ServerProcess.start

    class Processes:
        """The part of `subprocess` that the tests use."""

        def __getattr__(self, name):
            return getattr(subprocess, name)

        @staticmethod
        def Popen(args, **how):
            how.pop("creationflags", None)
            return subprocess.Popen(command(args, Processes.repo), **how)

    def started(self, *args, **how):
        Processes.repo = self.model_hf_repo
        if self.model_hf_repo not in (TEXT, VISION, None):
            pytest.skip(f"wants the model {self.model_hf_repo}")
        start(self, *args, **how)

    utils.subprocess = Processes()
    utils.ServerProcess.start = started

    ask = utils.ServerProcess.make_request

    def asked(self, *args, **how):
        """Names of headers have no case; the tests look them up in a `dict`, which has."""
        answer = ask(self, *args, **how)
        answer.headers = requests.structures.CaseInsensitiveDict(answer.headers)
        return answer

    utils.ServerProcess.make_request = asked
    get = requests.get

    def from_here(url, *args, **how):
        """The tests' two pictures, which lie on the hub."""
        if url.startswith("https://huggingface.co/") and url.endswith(".png"):
            answer = requests.Response()
            answer.status_code = 200
            answer._content = Path(PICTURES["truck" not in url]).read_bytes()
            return answer
        return get(url, *args, **how)

    requests.get = from_here


def pytest_collection_modifyitems(items):
    slow = os.environ.get("SLOW_TESTS")
    for item in items:
        reason = reason_of(item.nodeid)
        if reason and reason[0] != "differs":
            item.add_marker(pytest.mark.skip(reason=reason[1]))
        elif item.get_closest_marker("slow") and not slow:
            item.add_marker(pytest.mark.skip(reason="a slow test, of a large model"))
        elif reason:
            item.add_marker(pytest.mark.xfail(reason=reason[1], strict=True))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" or (report.when == "setup" and not report.passed):
        reason = getattr(report, "wasxfail", None)
        if report.skipped and reason is None:
            reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        kind = reason_of(item.nodeid)
        results[item.nodeid] = {
            "outcome": "differs" if hasattr(report, "wasxfail") and report.skipped else report.outcome,
            "kind": kind[0] if kind else ("model" if report.skipped else None),
            "reason": reason,
        }
        crash = getattr(report.longrepr, "reprcrash", None)
        if report.failed:
            results[item.nodeid]["reason"] = crash.message if crash else str(report.longrepr)
        # Written at once: a run that is stopped leaves what it has.
        target = os.environ.get("HAE_RESULTS")
        if target:
            Path(target).write_text(json.dumps(results, indent=1), encoding="utf-8")


def edit(folder, edits):
    """Changes what the tests expect, in a copy of them: each edit has to find its text."""
    for name, changes in edits.items():
        path = Path(folder) / "unit" / name
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            if old not in text:
                sys.exit(f"{name}: {old!r} is not in these tests")
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    edit(sys.argv[1], json.loads((HERE / "edits.json").read_text(encoding="utf-8")))
