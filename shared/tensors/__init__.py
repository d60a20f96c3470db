"""Moving tensors between services: references, framing, the producer's store, the consumer's transports."""
