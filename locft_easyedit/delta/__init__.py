"""An edit as an artefact of its own: one safetensors file that is applied, undone and exported."""
