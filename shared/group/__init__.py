"""The ranks of one service: how they meet, how rank 0 tells the others what to do, how they end together."""
