"""The Modelfile with which Ollama takes a GGUF file and its mmproj."""

CONTEXT_TOKENS = 8192
"""Room for a conversation of 16 decisions with a picture of 256 tokens each, and for its answers."""

# Gemma 3's turns as the checkpoint's chat template writes them. Ollama adds <bos> itself, takes the last message for
# the beginning of an answer where it is the assistant's, and puts a picture where "[img]" stands in a message.
_TEMPLATE = """\
{{- range $index, $message := .Messages }}
{{- $last := eq (len (slice $.Messages $index)) 1 }}
{{- if eq $message.Role "assistant" }}<start_of_turn>model
{{ $message.Content }}{{ if not $last }}<end_of_turn>
{{ end }}
{{- else }}<start_of_turn>{{ $message.Role }}
{{ $message.Content }}<end_of_turn>
{{ if $last }}<start_of_turn>model
{{ end }}
{{- end }}
{{- end }}"""


def modelfile(model: str, mmproj: str) -> str:
    """Return a Modelfile for a language model and its mmproj, named relative to the Modelfile."""
    return (
        f"FROM ./{model}\n"
        f"FROM ./{mmproj}\n"
        f'TEMPLATE """{_TEMPLATE}"""\n'
        "PARAMETER stop <end_of_turn>\n"
        "PARAMETER temperature 0\n"
        f"PARAMETER num_ctx {CONTEXT_TOKENS}\n"
    )
