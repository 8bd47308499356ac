"""Serve glimpse.v1.VisualQuestionAnswering, health and reflection over gRPC, in the gateway's event loop."""
