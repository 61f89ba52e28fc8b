"""ShapesQA, the built-in world of questions about drawn scenes, and where the model trained on it lies."""

from capa_probe.demo.locate import demo_data_path, demo_model_path

__all__ = ["demo_data_path", "demo_model_path"]
