"""The recorded numbers of the ramp model: a change of the computation cannot pass unseen, on any machine."""

from __future__ import annotations

import json

import torch

from ramp_golden import FILE, compute


def test_ramp_model_equals_the_record():
    recorded = json.loads(FILE.read_text(encoding="utf-8"))
    for case, now in zip(recorded["cases"], compute(), strict=True):
        assert case["context"] == now["context"]
        for name in ("latents", "last_logits"):
            torch.testing.assert_close(torch.tensor(now[name]), torch.tensor(case[name]), atol=2e-4, rtol=2e-4)
        assert case["new_ids"] == now["new_ids"]
