"""The seams: what the installed vLLM has there, and that a change is noticed and named.

After an upgrade of vLLM, look at the differences these tests print, change the bridge where it
must, and write the new snapshot: `python -m vllm_spec_plugins.engine.seams [WHEEL]`.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vllm_spec_plugins.engine import seams
from vllm_spec_plugins.engine.seams import SEAMS, Seam, Source, find, snapshot, snapshots
from vllm_spec_plugins.errors import UnsupportedEngineError

SUPPORTED = ["0.32", "0.33"]


def differences(old: dict[str, str], new: dict[str, str]) -> str:
    """Readable, and empty when there are none."""

    def lines(found: dict[str, str]) -> list[str]:
        return [f"{key}\n    {value}" for key, value in sorted(found.items())]

    return "\n".join(difflib.unified_diff(lines(old), lines(new), lineterm="", n=0))


@pytest.fixture
def fresh() -> Iterator[None]:
    """`require_supported` remembers its answer."""
    seams.require_supported.cache_clear()
    yield
    seams.require_supported.cache_clear()


def test_the_installed_vllm_is_as_remembered() -> None:
    version = seams.installed_version()
    assert version is not None
    found = snapshot(seams.installed_source())
    assert not (diff := differences(snapshots()[seams.minor(version)], found)), diff
    assert all(report.ok for report in seams.check())


@pytest.mark.usefixtures("fresh")
def test_the_installed_vllm_is_supported() -> None:
    seams.require_supported()


def test_what_changed_between_the_supported_versions() -> None:
    """Known, and handled: 0.33 gives these functions arguments that we leave alone."""
    assert sorted(snapshots()) == SUPPORTED
    old, new = (snapshots()[version] for version in SUPPORTED)
    changed = {key: (old[key], new[key]) for key in old if old[key] != new[key]}
    assert old.keys() == new.keys()
    added = {name: new[len(old) - 1 :] for name, (old, new) in changed.items()}
    assert all(new.startswith(old.rstrip(")")) for old, new in changed.values()), changed
    assert added == {
        "v1/sample/ops/topk_topp_sampler.py:apply_top_k_top_p": ", has_topp_only_rows: bool=True)",
        "v1/sample/rejection_sampler.py:rejection_sample": (
            ", fly_window_size: int | None=None, fly_entropy_threshold: float | None=None, "
            "fly_entropy_top_k: int=3)"
        ),
        "v1/worker/gpu/spec_decode/rejection_sampler_utils.py:rejection_sample": (
            ", fly_window_size: int=0, fly_entropy_threshold: float=0.3, fly_entropy_top_k: int=3)"
        ),
    }


@pytest.mark.parametrize("version", SUPPORTED)
def test_every_seam_is_there_in_every_version(version: str) -> None:
    found = snapshots()[version]
    assert found.keys() == {seam.key for seam in SEAMS}
    for seam in SEAMS:
        assert found[seam.key] not in ("(not there)", "(no such file)"), seam.key
        for name in seam.names:
            assert name in found[seam.key], f"{seam.key} has no {name}"


def test_no_seam_is_listed_twice() -> None:
    assert len({seam.key for seam in SEAMS}) == len(SEAMS)


# Reading a vLLM that is not imported.

MODULE = '''
"""Read, never run."""
raise RuntimeError("imported")

class Runner:
    limit: int = 3
    on, off = True, False

    def __init__(self, config):
        self.sampler = config.sampler
        self.size: int = 1

    @property
    def rows(self) -> int: ...

    async def step(self, batch: list[int] | None = None, *, last: bool = False) -> int: ...

def verify(ids, *, greedy=True):
    return sample(ids) + constrain(ids)
'''


def source_of(text: str) -> Source:
    def source(module: str) -> str:
        return {"runner.py": text}[module]

    return source


@pytest.mark.parametrize(
    ("name", "names", "found"),
    [
        ("Runner.__init__", (), "(self, config)"),
        ("Runner.rows", (), "(self)"),
        ("Runner.step", (), "(self, batch: list[int] | None=None, *, last: bool=False)"),
        ("Runner", ("limit", "rows", "sampler", "size", "gone"), "has limit, rows, sampler, size"),
        ("verify", (), "(ids, *, greedy=True)"),
        ("verify", ("sample", "constrain"), "(ids, *, greedy=True) using constrain, sample"),
        ("verify", ("sample", "gone"), "(ids, *, greedy=True) using sample"),
        ("Runner.gone", (), "(not there)"),
        ("Gone.step", (), "(not there)"),
    ],
)
def test_what_is_read(name: str, names: tuple[str, ...], found: str) -> None:
    seam = Seam("runner.py", name, "read", "a test", names)
    assert find(seam, source_of(MODULE)) == found


def test_a_file_that_is_gone() -> None:
    seam = Seam("no_such_file.py", "verify", "read", "a test")
    assert find(seam, source_of(MODULE)) == "(no such file)"
    assert find(seam, seams.installed_source()) == "(no such file)"


def write_wheel(folder: Path, version: str, alter: Callable[[str, str], str]) -> Path:
    """A wheel with the installed vLLM's files at our seams, each passed through `alter`."""
    wheel, source = folder / f"vllm-{version}-py3-none-any.whl", seams.installed_source()
    with zipfile.ZipFile(wheel, "w") as archive:
        for module in sorted({seam.module for seam in SEAMS}):
            # Whoever imported it would be told.
            text = "raise RuntimeError('imported')\n" + alter(module, source(module))
            archive.writestr(f"vllm/{module}", text)
    return wheel


def unchanged(_module: str, text: str) -> str:
    return text


def test_a_wheel_is_read_without_importing_it(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "0.40.0", unchanged)
    assert snapshot(seams.wheel_source(wheel)) == snapshot(seams.installed_source())


ALTERED = {
    "argument renamed": (
        "v1/sample/rejection_sampler.py",
        ("target_logits: torch.Tensor", "logits_of_target: torch.Tensor"),
        "rejection_sampler.py:rejection_sample",
    ),
    "method gone": (
        "v1/worker/worker_base.py",
        ("def init_device(", "def initialise_device("),
        "worker_base.py:WorkerWrapperBase.init_device",
    ),
    "field gone": (
        "v1/sample/metadata.py",
        ("top_k: ", "top_of_k: "),
        "metadata.py:SamplingMetadata",
    ),
    "global no longer used": (
        "v1/sample/rejection_sampler.py",
        ("output_token_ids = rejection_sample(", "output_token_ids = reject("),
        "rejection_sampler.py:RejectionSampler.forward",
    ),
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_altered_seam_is_noticed(change: str, tmp_path: Path) -> None:
    """Negative control: one word of vLLM changed, and only its seam differs."""
    module, (old, new), seam = ALTERED[change]

    def alter(name: str, text: str) -> str:
        if name == module:
            assert old in text
            return text.replace(old, new)
        return text

    before = snapshot(seams.installed_source())
    after = snapshot(seams.wheel_source(write_wheel(tmp_path, "0.40.0", alter)))
    changed = [key for key in before if before[key] != after[key]]
    assert any(key.endswith(seam) for key in changed)
    assert all(module in key for key in changed)
    assert seam in differences(before, after)


@pytest.mark.usefixtures("fresh")
def test_an_altered_vllm_is_refused_with_both_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    original = seams.installed_source()

    def altered(module: str) -> str:
        return original(module).replace("def init_device(self)", "def init_device(self, device)")

    monkeypatch.setattr(seams, "installed_source", lambda: altered)
    version = seams.installed_version()
    assert version is not None
    with pytest.raises(UnsupportedEngineError) as caught:
        seams.require_supported()
    message = str(caught.value)
    assert (
        f"vLLM {version} differs from the {seams.minor(version)} that vllm-spec-plugins" in message
    )
    assert (
        "  v1/worker/worker_base.py:WorkerWrapperBase.init_device: "
        "expected (self), found (self, device)\n"
    ) in message
    assert f"Install vLLM {seams.minor(version)}.0" in message
    assert "vllm-spec doctor" in message
    [broken] = [report for report in seams.check() if not report.ok]
    assert broken.name.endswith("init_device")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", None])
def test_another_version_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "installed_version", lambda: version)
    with pytest.raises(UnsupportedEngineError) as caught:
        seams.require_supported()
    known = f"does not know vLLM {version or '(not installed)'}: it serves 0.32, 0.33."
    assert known in str(caught.value)
    assert not any(report.ok for report in seams.check())


@pytest.mark.parametrize(
    ("version", "minor"), [("0.32.0", "0.32"), ("0.33.1+cpu", "0.33"), ("0.33.0rc1", "0.33")]
)
def test_minor(version: str, minor: str) -> None:
    assert seams.minor(version) == minor


def test_snapshots_are_written_for_the_installed_version_and_for_wheels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(seams, "SNAPSHOTS", tmp_path / "seams.json")
    seams.main([str(write_wheel(tmp_path, "0.40.0", unchanged))])
    written = json.loads((tmp_path / "seams.json").read_text())
    version = seams.installed_version()
    assert version is not None
    assert set(written) == {seams.minor(version), "0.40"}
    assert written["0.40"] == snapshots()[seams.minor(version)]
    assert capsys.readouterr().out == f"seams.json: {seams.minor(version)}, 0.40\n"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.33.0"])
def test_a_released_wheel_is_as_remembered(version: str, tmp_path: Path) -> None:
    """Some hundred megabytes from a package index; skipped where there is none."""
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(tmp_path)]
    command += ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
    command += ["--platform", "manylinux_2_31_x86_64", "--platform", "manylinux_2_28_x86_64"]
    done = subprocess.run(
        [*command, "--abi", "cp311", "--abi", "abi3", "--abi", "none"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"vllm {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    [wheel] = tmp_path.glob("*.whl")
    found = snapshot(seams.wheel_source(wheel))
    assert not (diff := differences(snapshots()[seams.minor(version)], found)), diff


# What is patched when.

PATCHED = """
import json, sys
from vllm.config.vllm import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.engine.output_processor import RequestState
from vllm.v1.worker.worker_base import WorkerWrapperBase

PLACES = [
    (EngineArgs, "create_speculative_config"),
    (VllmConfig, "__post_init__"),
    (VllmConfig, "num_lookahead_tokens"),
    (VllmConfig, "_get_v2_model_runner_unsupported_features"),
    (SamplingParams, "_validate_spec_decode"),
    (NewRequestData, "from_request"),
    (RequestState, "_new_completion_output"),
    (WorkerWrapperBase, "init_device"),
]

def now():
    return [owner.__dict__[name] for owner, name in PLACES]

def configure(spec):
    EngineArgs(
        model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", speculative_config=spec
    ).create_engine_config()

def changed(before):
    return [f"{o.__name__}.{n}" for (o, n), a, b in zip(PLACES, before, now()) if a is not b]

originals = now()
load_general_plugins()
configure(None)
ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
configure(ngram)
without_us = changed(originals)
before = now()
configure({**ngram, "verifier": "lossless"})
with_us, patched = changed(originals), now()
from vllm_spec_plugins.plugin import register
register()
register()
configure({**ngram, "verifier": "lossless"})
print(json.dumps([without_us, with_us, changed(patched)]))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What changed in vLLM's classes: without an option of ours, with one, with one again."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", PATCHED, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_an_option_of_ours_only_the_config_is_wrapped(patched: list[list[str]]) -> None:
    assert patched[0] == ["EngineArgs.create_speculative_config"]


def test_with_one_every_patched_seam_is_and_no_other(patched: list[list[str]]) -> None:
    assert sorted(patched[1]) == sorted(seam.name for seam in SEAMS if seam.use == "patched")


def test_nothing_is_patched_twice(patched: list[list[str]]) -> None:
    assert patched[2] == []
