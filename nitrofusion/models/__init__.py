"""Model families; each is one file behind load, denoise and encode_prompt."""
