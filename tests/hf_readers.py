"""Real readers of Hugging Face's folders, in Pythons of their own: run as a script, which imports nothing of gqa_jax.

python hf_readers.py logits transformers|mlx JOBS.json     logits of folders
python hf_readers.py save JOBS.json                        folders as transformers writes them
python hf_readers.py tokenize JOBS.json                    ids and texts by AutoTokenizer
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", USE_TORCH="1")


def with_transformers(jobs):
    """Each job: folder, tokens.npy (B, T), positions.npy (T,) or null, where to put the logits (B, T, V)."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    for folder, tokens, positions, out in jobs:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        odd = {
            name: found
            for name, found in info.items()
            if name in ("missing_keys", "unexpected_keys", "mismatched_keys") and found
        }
        assert not odd, odd
        places = {} if positions is None else {"position_ids": torch.from_numpy(np.load(positions))[None]}
        with torch.no_grad():
            found = model.eval()(torch.from_numpy(np.load(tokens)), **places).logits
        np.save(out, found.float().numpy())


def with_mlx(jobs):
    """As `with_transformers`; no positions but 0, 1, ..."""
    from pathlib import Path

    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    for folder, tokens, positions, out in jobs:
        assert positions is None
        model, _ = load_model(Path(folder), strict=True)
        np.save(out, np.array(model(mx.array(np.load(tokens))).astype(mx.float32)))


def save(jobs):
    """Each job: class, fields of its configuration, folder, bytes of a file of arrays."""
    import torch
    import transformers

    for name, fields, folder, shard in jobs:
        torch.manual_seed(0)
        config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**fields)
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder, max_shard_size=shard)


def tokenize(jobs):
    """Each job: folder, texts, where to put ids, what they decode to, and the end of a document."""
    from transformers import AutoTokenizer

    for folder, texts, out in jobs:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = [tokenizer(text)["input_ids"] for text in texts]
        said = {"ids": ids, "texts": [tokenizer.decode(one) for one in ids], "eos": tokenizer.eos_token_id}
        with open(out, "w") as file:
            json.dump(said, file)


if __name__ == "__main__":
    what, *reader, path = sys.argv[1:]
    with open(path) as file:
        jobs = json.load(file)
    if what == "logits":
        {"transformers": with_transformers, "mlx": with_mlx}[reader[0]](jobs)
    else:
        {"save": save, "tokenize": tokenize}[what](jobs)
