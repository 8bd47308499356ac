"""What runs Glimpse beside its own processes: Prometheus, Alertmanager, Grafana, Kubernetes."""
