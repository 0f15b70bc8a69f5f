"""What differs between base models: which layers there are, how a prompt is encoded, what a picture's latents are."""
