"""Device memory: the modes in which it is used, what they take, which one fits, and who has the device now."""
