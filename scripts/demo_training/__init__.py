"""How the demo model is trained: one module for each part of the recipe, run by ``train_demo_lvlm.py``."""
