#!/bin/bash
# mlx-vlm 0.7.10: its server begins a prompt of Gemma 3 that has a picture with two BOS tokens.
#
# Assumed: prepare_inputs(..., add_special_tokens=False), which the server calls for Gemma 3 because the chat template writes
# <bos> already, tokenizes without adding one, with or without a picture.
# What happens: with a picture, process_inputs passes the argument only to a processor whose signature names it. Gemma3Processor
# of mlx-vlm takes **kwargs, so the argument is dropped and the tokenizer adds its BOS.
#
# Seen with mlx-vlm 0.7.10, transformers 5.23.0 (2026-11-29):
#   text alone: 1 BOS [2, 114, 115]
#   with a picture: 2 BOS [2, 2, 114, 115, 20, 20, 5, 6, 6, 6, 6, 7, 20, 20]
# So every prompt with a picture begins with two BOS tokens, which no training text does.
# Way round: remove the BOS from the TemplateProcessing of the folder's tokenizer.json.
set -euo pipefail

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-vlm==0.7.10 transformers==5.23.0 pillow
"$tmp/venv/bin/python" - <<'P'
from mlx_vlm.models.gemma3.processing_gemma3 import Gemma3Processor
from mlx_vlm.utils import prepare_inputs
from PIL import Image
from transformers import GemmaTokenizer
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

# As the published tokenizers: a BOS is added to every text.
special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
pictures = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
words = [*special, *pictures.values(), "\n\n", "hi", *(f"<0x{byte:02X}>" for byte in range(256))]
tokenizer = GemmaTokenizer(
    vocab={word: number for number, word in enumerate(words)}, merges=[], add_bos_token=True,
    extra_special_tokens=pictures,
)
assert tokenizer("hi")["input_ids"][0] == 2 and tokenizer("hi", add_special_tokens=False)["input_ids"][0] != 2
image_processor = Gemma3ImageProcessorPil(size={"height": 56, "width": 56}, image_seq_length=4)
processor = Gemma3Processor(image_processor, tokenizer, chat_template="{{ bos_token }}", image_seq_length=4)

counts = {}
for name, prompt, images in (
    ("text alone", "<bos>hi", None),
    ("with a picture", "<bos>hi<start_of_image>", [Image.new("RGB", (56, 56))]),
):
    ids = prepare_inputs(processor, images=images, prompts=[prompt], add_special_tokens=False)["input_ids"]
    ids = ids.tolist()[0]
    counts[name] = ids.count(2)
    print(f"{name}: {counts[name]} BOS {ids}")
assert counts == {"text alone": 1, "with a picture": 2}, "the behaviour changed"
P
