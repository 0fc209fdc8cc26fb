"""Serving: many requests share the passes of one denoiser, over HTTP and on clusters."""
