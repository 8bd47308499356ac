"""From images and a question to what the LLM reads of them, with as few model calls as possible.

stage      does one step after the other for every image of a request, and takes turns with other requests
plan       decides which step comes next for one image; pure
"""

from service.vision_stage.stage import VisionModel, VisionStage, decoding_cost

__all__ = ["VisionModel", "VisionStage", "decoding_cost"]
