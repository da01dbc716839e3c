"""How long steps take on given hardware: an analytic model fitted to public measurements, and measured tables."""
