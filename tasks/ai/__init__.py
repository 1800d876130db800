"""AI providers by their APIs: answers, fields of the answers, retirement of models and versions."""
