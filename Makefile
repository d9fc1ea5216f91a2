PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TRITON_DEFAULT_FP_FUSION ?= 1

.PHONY: protos
protos: ## Regenerate the SDK's stubs from protos/
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=clients/python --pyi_out=clients/python \
	  --grpc_python_out=clients/python protos/loraplex/v1/*.proto
