#import "TrainingGraph.h"

#include <map>
#include <memory>
#include <string>
#include <vector>

#include <executorch/extension/data_loader/file_data_loader.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/extension/training/module/training_module.h>
#include <executorch/extension/training/optimizer/sgd.h>

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::extension::FileDataLoader;
using executorch::extension::TensorPtr;
using executorch::extension::training::TrainingModule;
using executorch::extension::training::optimizer::SGD;
using executorch::extension::training::optimizer::SGDOptions;
using executorch::runtime::EValue;

static const char *const kMethod = "forward";

@implementation TrainingGraph {
  std::unique_ptr<TrainingModule> _module;
  std::unique_ptr<SGD> _optimiser;
}

- (instancetype)initWithFile:(NSString *)file {
  self = [super init];
  if (self == nil) return nil;
  auto loader = FileDataLoader::from(file.fileSystemRepresentation);
  if (!loader.ok()) return nil;
  _module = std::make_unique<TrainingModule>(std::make_unique<FileDataLoader>(std::move(loader.get())));
  return _module->load() == executorch::runtime::Error::Ok ? self : nil;
}

static TensorPtr tensorOf(NSData *data, NSArray<NSNumber *> *shape, ScalarType kind) {
  std::vector<executorch::aten::SizesType> sizes;
  for (NSNumber *size in shape) sizes.push_back(size.intValue);
  return executorch::extension::from_blob(const_cast<void *>(data.bytes), sizes, kind);
}

- (BOOL)passInputs:(NSData *)inputs
             shape:(NSArray<NSNumber *> *)shape
            labels:(NSData *)labels
        labelShape:(NSArray<NSNumber *> *)labelShape
           classes:(BOOL)classes {
  auto in = tensorOf(inputs, shape, ScalarType::Float);
  auto out = tensorOf(labels, labelShape, classes ? ScalarType::Long : ScalarType::Float);
  return _module->execute_forward_backward(kMethod, std::vector<EValue>{*in, *out}).ok();
}

- (std::map<std::string_view, Tensor>)parameters {
  auto found = _module->named_parameters(kMethod);
  return found.ok() ? std::map<std::string_view, Tensor>(found.get()) : std::map<std::string_view, Tensor>();
}

- (NSArray<NSString *> *)names {
  NSMutableArray<NSString *> *names = [NSMutableArray array];
  for (const auto &one : [self parameters]) [names addObject:@(std::string(one.first).c_str())];
  return names;
}

- (NSArray<NSNumber *> *)shapeOf:(NSString *)name {
  const auto all = [self parameters];
  const auto found = all.find(name.UTF8String);
  if (found == all.end()) return nil;
  NSMutableArray<NSNumber *> *shape = [NSMutableArray array];
  for (auto size : found->second.sizes()) [shape addObject:@(size)];
  return shape;
}

- (NSData *)valuesOf:(NSString *)name {
  const auto all = [self parameters];
  const auto found = all.find(name.UTF8String);
  if (found == all.end()) return nil;
  return [NSData dataWithBytes:found->second.const_data_ptr() length:found->second.nbytes()];
}

- (BOOL)setValues:(NSData *)values of:(NSString *)name {
  auto all = [self parameters];
  auto found = all.find(name.UTF8String);
  if (found == all.end() || found->second.nbytes() != values.length) return NO;
  memcpy(found->second.mutable_data_ptr(), values.bytes, values.length);
  return YES;
}

- (BOOL)beginWithRate:(double)rate momentum:(double)momentum weightDecay:(double)weightDecay {
  auto found = _module->named_parameters(kMethod);
  if (!found.ok()) return NO;
  _optimiser = std::make_unique<SGD>(found.get(), SGDOptions(rate, momentum, 0, weightDecay, false));
  return YES;
}

- (BOOL)step {
  auto gradients = _module->named_gradients(kMethod);
  return gradients.ok() && _optimiser->step(gradients.get()) == executorch::runtime::Error::Ok;
}

@end
