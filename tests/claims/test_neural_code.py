"""The claims of neural codes in small: which halves they have, and that shuffled labels are shuffled."""

from __future__ import annotations

from actkit.claims.neural_code import STATEMENTS, Sizes, images, run


def test_it_runs_in_small():
    outcome = run(Sizes(seeds=(0,), widths=(4, 16), epochs=1, cnn_epochs=1), progress=False)
    assert [claim.statement for claim in outcome.claims] == [each.statement for each in STATEMENTS]
    assert "Spearman -1.00" in outcome.claims[0].here and "K-NN on pixels 99.4 %" in outcome.claims[1].here


def test_no_image_is_trained_on_and_tested():
    trained, tested = images("train", "calibration")["pixel_values"], images("test")["pixel_values"]
    assert len(trained) + len(tested) < 1797
    assert not {image.numpy().tobytes() for image in tested} & {image.numpy().tobytes() for image in trained}
