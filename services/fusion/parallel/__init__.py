"""Spreading a run over ranks: guidance branches on two groups, video tokens over the ranks of each group."""
