"""The video VAE, the audio VAE, its mel front end and the vocoder as pure PyTorch: no rank, service or environment.

Shape suffixes used throughout: B batch, C channels, F frames (of a latent or of pixels), H W height and width,
L audio latent rows, M mel bins, T mel frames or, inside a network, positions in time, S sound samples.
"""
