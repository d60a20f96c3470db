"""From noise to latents: schedules, solvers, guidance and the one sampling loop."""
