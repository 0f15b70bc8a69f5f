"""The names that Stability's own files give to the parts of a model: UNet, VAE and text encoders, one table each.

Every table takes the names that diffusers or transformers uses and returns those of a single-file checkpoint.
"""
