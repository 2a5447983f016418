"""A real pretrained Llama (stories260k): the decoder and generation against `transformers`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from realloc.sampling import Sampling
from runtime.attention import pack
from tests.hf_models import load_oracle
from tests.unit.runtime.test_decoder import decoder_of, oracle_logits
from tests.unit.runtime.test_generation import responses, run

DATA = Path(os.environ.get("REALLOC_DATA", Path(__file__).parents[3] / "shared" / "data"))
MODEL = DATA / "stories260k"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason=f"no stories260k model in {DATA}")


def test_logits_and_greedy_text_equal_transformers() -> None:
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(MODEL)
    prompts = ["Once upon a time", "Lily had a red ball. One day", "The dog"]
    ids = [torch.tensor([1, *tokenizer(p, add_special_tokens=False).input_ids]) for p in prompts]
    lengths = tuple(map(len, ids))
    tokens = torch.cat(ids)
    decoder, oracle = decoder_of(MODEL), load_oracle(MODEL)
    with torch.no_grad():
        logits = decoder.logits(decoder.forward(tokens, pack(lengths)))
        torch.testing.assert_close(logits, oracle_logits(oracle, tokens, lengths), rtol=1e-4, atol=1e-4)
        # each token is likely: the weights are read as they were trained
        logprobs = decoder.logprobs(decoder.forward(tokens, pack(lengths)), tokens.roll(-1))
        assert logprobs[torch.arange(4)].mean() > -4.0
        expected = [
            oracle.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=60,
                do_sample=False,
                eos_token_id=1,
                pad_token_id=2,
            )[0, len(prompt) :].tolist()
            for prompt in ids
        ]
    result = run(decoder, tokens, lengths, max_new_tokens=60, eos_ids={1}, sampling=Sampling(temperature=0.0))
    assert responses(result, lengths) == expected
    assert "there was a little" in tokenizer.decode(responses(result, lengths)[0])
