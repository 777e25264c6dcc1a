"""The gradients at work: the example's transformer learns digits, to the same bits each time, and its whole gradient is
that of central differences.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import seeds
from child import run_python

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "digits_transformer.py"
SPEC = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
assert SPEC is not None and SPEC.loader is not None
digits_transformer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(digits_transformer)

# Runs "epochs,seed,dtype" and prints the history of each: the loss, as written in hexadecimal, and the accuracy.
CODE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import digits_transformer
for run in sys.argv[2:]:
    epochs, seed, dtype = run.split(",")
    for loss, accuracy in digits_transformer.train(int(epochs), int(seed), getattr(np, dtype)):
        print(run, loss.hex(), accuracy)
"""


def trained(*runs: str) -> list[list[tuple[float, float]]]:
    """(loss, test accuracy) after each epoch, for each run.

    In a process of one BLAS thread: on a busy machine of two cores, 20 epochs took 37 to 48 s with two, and 2 to 7 s
    with one. (OpenBLAS's threads wait for each other in each of 14,000 small products.)
    """
    # MKL and Apple's Accelerate have names of their own.
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    done = run_python(CODE, str(EXAMPLE.parent), *runs, env=dict.fromkeys(names, "1"))
    lines = [line.split() for line in done.stdout.splitlines()]
    return [[(float.fromhex(loss), float(accuracy)) for name, loss, accuracy in lines if name == run] for run in runs]


@pytest.mark.slow
@pytest.mark.processes
def test_learns_digits() -> None:
    # Seeds 0 to 9 gave 98.3 to 99.2 %, torch 97.8 to 98.6 %; 2 to 3 seconds each, with compiled kernels.
    for history in trained("20,0,float32", "20,1,float32", "20,2,float32"):
        assert len(history) == 20 and history[-1][1] >= 0.97
        assert history[-1][0] < 0.25 < 1.0 < history[0][0]


@pytest.mark.processes
def test_same_seed_same_bits() -> None:
    first, other = trained("2,5,float32", "2,6,float32")
    (again,) = trained("2,5,float32")
    assert first == again
    assert first != other


@pytest.mark.processes
def test_float32_follows_float64() -> None:
    single, double = trained("2,3,float32", "2,3,float64")  # 46 steps
    for (loss, accuracy), (loss64, accuracy64) in zip(single, double, strict=True):
        assert loss == pytest.approx(loss64, rel=1e-4)
        assert accuracy == pytest.approx(accuracy64, abs=2.5 / 360)


def test_gradient_is_that_of_central_differences() -> None:
    """Along random directions in each parameter, which no wrong entry survives: float64, 3 images."""
    rng = seeds.generator(7)
    p = digits_transformer.initial_parameters(rng, np.float64)
    # Away from the initial zeros and ones, at which a bias or a gain in the wrong place would not show.
    p = {name: x + 0.1 * rng.standard_normal(x.shape) for name, x in p.items()}
    images, digits = (x[:3] for x in digits_transformer.load_digits(np.float64)[:2])
    _, gradients = digits_transformer.loss_and_gradients(p, images, digits)
    assert gradients.keys() == p.keys() and sum(x.size for x in p.values()) == 17_770

    def loss_at(name: str, x: np.ndarray) -> float:
        logits, _ = digits_transformer.model(p | {name: x}, images)
        return digits_transformer.cross_entropy(logits, digits)[0]

    for name, x in p.items():
        assert gradients[name].shape == x.shape and gradients[name].dtype == np.float64
        for _ in range(3):
            direction = rng.standard_normal(x.shape)
            direction /= np.linalg.norm(direction)
            h = 1e-4
            # Fourth order: the error is about 1e-11.
            near = loss_at(name, x + h * direction) - loss_at(name, x - h * direction)
            far = loss_at(name, x + 2 * h * direction) - loss_at(name, x - 2 * h * direction)
            expected = (8 * near - far) / (12 * h)
            assert (gradients[name] * direction).sum() == pytest.approx(expected, rel=1e-7, abs=1e-9), name


def test_runs_from_the_shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--epochs", "1", "--seed", "4"])
    digits_transformer.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["epoch", "loss", "test", "accuracy", "seconds"]
    assert len(lines) == 2 and lines[1].split()[0] == "1"
