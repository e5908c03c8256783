"""A run's matrix products go to one library from its start to its end, over every stop, whatever the number of threads.

On two threads, with layers wide enough that all their products go to oneDNN where it is chosen.
"""

import json
import shutil

import pytest
import torch
from runs import StopAt, arguments, state

from miniclip.commands import train as trainer
from miniclip.fast import matmul

LIBRARY = matmul.available()[-1]
WIDE = (
    "--model.clip.vision.width=256",
    "--model.clip.vision.layers=1",
    "--model.clip.text.width=256",
    "--model.clip.text.layers=1",
    "--data.num_workers=0",
)
STOP = [{"class_path": f"runs.{StopAt.__name__}", "init_args": {"step": 2}}]


def begin(data, run, *flags, library=None):
    """Trains up to step 4 on two threads; without a library the environment names none."""
    args = arguments(data, run, *WIDE, *flags, steps=4)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(matmul.VARIABLE, raising=False)
        if library is not None:
            patch.setenv(matmul.VARIABLE, library)
        torch.set_num_threads(2)
        try:
            trainer.main([flag for flag in args if not flag.startswith("--data.val=")])
        finally:
            torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """A run that was stopped at step 2."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(SystemExit):
        begin(data, run, f"--trainer.callbacks={json.dumps(STOP)}", library=LIBRARY)
    return run


@pytest.fixture
def resume(data, tmp_path, capsys, half):
    """resume(…) goes on with a copy of the run, and returns its folder and what it printed."""

    def go_on(library=None, change=None):
        run = shutil.copytree(half, tmp_path / "run")
        if change is not None:
            path = run / "checkpoints/last.ckpt"
            checkpoint = torch.load(path, weights_only=True)
            change(checkpoint["miniclip_settings"])
            torch.save(checkpoint, path)
        capsys.readouterr()
        begin(data, run, "--ckpt_path=last", library=library)
        return run, capsys.readouterr().out

    return go_on


@pytest.mark.long
def test_a_resumed_run_takes_its_library_and_ends_with_the_same_bits(data, tmp_path, resume):
    begin(data, tmp_path / "straight", library=LIBRARY)
    run, printed = resume()
    assert f"Matrix products: {matmul.TITLES[LIBRARY]}\n" in printed
    assert "other settings" not in printed
    for name, weights in state(tmp_path / "straight").items():
        assert torch.equal(state(run)[name], weights), name


@pytest.mark.long
@pytest.mark.skipif(LIBRARY == matmul.MKL, reason="there is one library")
def test_a_run_that_is_resumed_with_the_other_library_prints_so(resume):
    assert "products: the checkpoint has onednn, this run mkl" in resume(library=matmul.MKL)[1]


@pytest.mark.long
@pytest.mark.skipif(LIBRARY == matmul.MKL, reason="there is one library")
def test_a_checkpoint_from_before_there_was_a_choice_goes_on_with_mkl(resume):
    with matmul.using(matmul.ONEDNN):
        assert "Matrix products: MKL\n" in resume(change=lambda settings: settings.pop("products"))[1]
        assert matmul.library() == matmul.ONEDNN  # as it was before the run


def test_a_library_that_is_none_is_refused(data, tmp_path, capsys):
    with pytest.raises(SystemExit) as found:
        begin(data, tmp_path / "run", library="openblas")
    assert found.value.code == 2
    assert "MINICLIP_PRODUCTS is 'openblas'; valid are mkl and onednn" in capsys.readouterr().err
