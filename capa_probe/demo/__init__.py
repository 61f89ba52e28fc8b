"""ShapesQA, the built-in world of questions about drawn scenes, and where the models trained on it lie."""

from capa_probe.demo.locate import DEMO_MODELS, DemoModel, demo_data_path, demo_model_path

__all__ = ["DEMO_MODELS", "DemoModel", "demo_data_path", "demo_model_path"]
