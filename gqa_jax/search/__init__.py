"""From laws to answers: what a model costs, which heads cost the least, and what to train next."""
