"""Models that are no decoders with keys and values: encoders, recurrent ones, and those with positions of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from capture_models import error, tokens

from qcompile.capture import capture
from qcompile.errors import CaptureError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def test_encoders_return_what_their_class_returns(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertModel

    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    for cls, name in ((BertModel, "last_hidden_state"), (BertForMaskedLM, "logits")):
        model = cls(BertConfig(**SMALL)).eval()
        model.save_pretrained(tmp_path / name)
        program = capture(tmp_path / name)
        assert [n.name for n in program.inputs][:2] == ["input_ids", "attention_mask"]
        found = program.run({"input_ids": ids, "attention_mask": mask, **positions(program, ids)})
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask)
        assert error(found[name], wanted[name]) <= 1e-6
        assert any("token_type_ids" in note for note in program.info["notes"])


def positions(program: object, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [n.name for n in program.inputs]  # type: ignore[attr-defined]
    return {"position_ids": torch.arange(ids.shape[1]).expand_as(ids)} if "position_ids" in names else {}


def test_positions_that_begin_after_the_padding_id_stay_the_models_business() -> None:
    from transformers import RobertaConfig, RobertaForCausalLM

    torch.manual_seed(0)
    model = RobertaForCausalLM(RobertaConfig(**SMALL, is_decoder=True, pad_token_id=1)).eval()
    program = capture(model)
    assert "position_ids" not in [n.name for n in program.inputs]
    ids = tokens()
    with torch.no_grad():
        assert error(program(ids), model(ids).logits) <= 1e-6


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(CaptureError, match="encoder-decoder"):
        capture(tmp_path)


def test_a_graph_that_holds_for_some_lengths_only_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like a chunked scan, whose loop torch.export unrolls for the example's number of chunks."""
    from transformers import BertConfig, BertModel

    model, forward = BertModel(BertConfig(**SMALL)).eval(), BertModel.forward

    def chunked(self: BertModel, input_ids: torch.Tensor, **options: torch.Tensor) -> object:
        out = forward(self, input_ids=input_ids, **options)
        for _ in range(1 if options["attention_mask"].shape[1] < 16 else 2):
            out.last_hidden_state = out.last_hidden_state * 2
        return out

    capture(model)
    monkeypatch.setattr(BertModel, "forward", chunked)
    with pytest.raises(CaptureError, match="not its graph for 64"):
        capture(model)
