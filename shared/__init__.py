"""What two or more services need: tensor transport, shapes, errors, gRPC bootstrap, logging, checkpoints."""
