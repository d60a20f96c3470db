"""The twin diffusion transformer of Ovi as pure PyTorch: no rank, device, service or environment.

Shape suffixes used throughout: C latent channels, F latent frames, H W latent height and width, T video tokens,
S audio tokens, L text tokens, D model width, N heads, K head dim, R modulation rows (1, or 2 with a clean first frame).
"""
