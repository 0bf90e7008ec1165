"""`loretta plan` prints one table, and refuses in one line what cannot be planned."""

import pytest

SEVEN = ["plan", "--model", "llama-2-7b", "--seq", 128]


def test_shows_every_method_side_by_side_on_each_device(loretta, llama) -> None:
    sharded = ["--gpus", 8, "--fsdp", "--checkpointing", "--memory", 24]
    ran = loretta("plan", "--model", llama, "--seq", 32, "--batch", 2, *sharded)
    assert (ran.code, ran.err) == (0, "")
    head, *lines = ran.out.splitlines()
    assert "activations  peak (estimated)  fits 24 GiB  largest batch" in head
    assert [line.split()[0] for line in lines] == ["adp", "rep", "lora", "full"]


def test_json_has_bytes_and_the_step(loretta, llama) -> None:
    ran = loretta("plan", "--model", llama, "--seq", 32, "--memory", 0.001, "--method", "rep", "--json")
    result = ran.result()
    assert (result["seq"], result["batch"], result["checkpointing"]) == (32, 1, "none")
    row = result["methods"]["rep"]
    assert row["optimiser"] > 2 * row["gradients"] > 0
    assert row["fits"] == (row["peak"] <= 0.001 * 2**30) == (row["largest_batch"] >= 1)
    peaks = [
        loretta("plan", "--model", llama, "--seq", 32, "--method", "rep", "--json", "--batch", rows).result()
        for rows in (row["largest_batch"], row["largest_batch"] + 1)
    ]
    fits = [found["methods"]["rep"]["peak"] <= 0.001 * 2**30 for found in peaks]
    assert fits == [True, False]


def test_a_quantised_base_is_smaller_and_not_trained_in_full(loretta) -> None:
    ran = loretta(*SEVEN, "--quant", "4bit", "--method", "full", "rep", "adp", "--json")
    assert list(ran.result()["methods"]) == ["adp", "rep"]
    assert ran.result()["methods"]["adp"]["trainable"] == 876_800
    # 6.48 billion weights of the blocks in 4.5 bits, the rest, the adapters' norms among it, in 16
    assert ran.result()["methods"]["rep"]["weights"] == pytest.approx(
        6_476_005_376 * 4.5 / 8 + 2 * 262_410_240, rel=1e-3
    )


@pytest.mark.parametrize(
    ("options", "message"),
    {
        "unknown-model": (["--model", "some/body"], "presets: llama-2-7b"),
        "no-rows": (["--batch", 0], "argument --batch: must be a whole number of at least 1, not '0'"),
        "no-tokens": (["--seq", 0], "argument --seq: must be a whole number of at least 2, not '0'"),
        "no-gpus": (["--gpus", 0], "argument --gpus: must be a whole number of at least 1, not '0'"),
        "no-memory": (["--memory", 0], "argument --memory: must be a number above 0, not '0'"),
        "too-long": (["--seq", 5000], "--seq 5000 is more than the 4096 positions of llama-2-7b"),
        "nothing-to-shard-over": (["--fsdp"], "--fsdp needs --gpus of at least 2"),
        "quantised-and-trained": (["--quant", "8bit", "--method", "full"], "a quantised base cannot be trained"),
        "no-method-of-that-name": (["--method", "ia3"], "argument --method: invalid choice: 'ia3'"),
        "option-of-another-method": (["--method", "full", "--rank", 3], "--rank belongs to --method adp, not full"),
        "refused-by-the-config": (["--rank", 0], "tensor_rank must be an integer of at least 1"),
        "no-such-target": (["--target-modules", "nowhere"], "the method does not fit this model"),
    }.values(),
)
def test_refuses_in_one_line(loretta, options, message) -> None:
    ran = loretta(*SEVEN, *options)
    assert (ran.code, ran.out) == (2, "")
    assert len(ran.err.splitlines()) == 1, ran.err
    assert message in ran.err
