"""LoRA with peft: attach, train, save, load, merge."""

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from ..conftest import tokens


def test_lora_attach_train_save_load_merge(tmp_path, model, input_ids) -> None:
    model.save_pretrained(tmp_path / "base")
    untouched = model(input_ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert 0 < sum(parameter.numel() for parameter in trainable) < sum(p.numel() for p in model.parameters()) / 2

    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted.train()(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    with torch.no_grad():  # with gradients, short sequences take another path, equal to rounding
        expected = adapted.eval()(input_ids).logits
        assert (expected - untouched).abs().max() > 1e-2
        adapted.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(loaded(input_ids).logits, expected)
        generated = loaded.generate(input_ids=input_ids, max_new_tokens=4, do_sample=False)
        assert generated.shape == (2, input_ids.shape[1] + 4)

        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids).logits, expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.equal(reloaded(input_ids).logits, merged(input_ids).logits)


def test_adapter_finds_its_base_model(tmp_path, model) -> None:
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained(tmp_path / "a")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(found(tokens()).logits, model(tokens()).logits)
