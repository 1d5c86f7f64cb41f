"""Isolate by design: neurons reserved before training for one id each, so that memory collects there."""
